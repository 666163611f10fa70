"""What spans the life of the process."""

import gc

from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings


def test_while_it_serves_the_collector_leaves_alone_what_was_there_before(settings: Settings) -> None:
    before = gc.get_threshold(), gc.get_freeze_count()
    with TestClient(create_app(settings)):
        assert gc.get_freeze_count() > 100_000
        assert gc.get_threshold()[0] == 10_000
    assert (gc.get_threshold(), gc.get_freeze_count()) == before
