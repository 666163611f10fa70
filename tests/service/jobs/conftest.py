"""Databases to keep jobs in, and what a job asks for."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.jobs.job import Job, Order
from service.jobs.store import JobStore
from tests.databases import new_schema


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    return new_schema(request.getfixturevalue("postgres"))


@pytest.fixture
def open_store(database: str) -> Iterator[Callable[..., JobStore]]:
    """Opens the database for a service; as often as a test wants."""
    stores = []

    def open_for(home: str = "here") -> JobStore:
        stores.append(JobStore(database, home))
        return stores[-1]

    yield open_for
    for store in stores:
        store.close()


@pytest.fixture
def jobs(open_store: Callable[..., JobStore]) -> JobStore:
    return open_store()


class Hesitant(JobStore):
    """Something comes between its look at a job and what it does next."""

    meanwhile: Callable[[Job], object]

    def get(self, job_id: str) -> Job:
        job = super().get(job_id)
        self.meanwhile(job)
        return job


def order(**changes: object) -> Order:
    asked = {"model": "greys", "version": "1", "name": "shades", "dataset": "ds-1", "seed": 0, "promote": "if_better"}
    return Order.model_validate(asked | {"recipe": {}} | changes)
