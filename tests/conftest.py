"""Fixtures: a clean environment for every test, and factories of real things."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.databases import postgres  # noqa: F401 - a fixture for all
from tests.disks import read_only, small_disk  # noqa: F401
from tests.tiny import TINY, make_bundle, squares, write_class_folders
from training import runs

DATA = os.environ.get("SAFELIGHT_DATA")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="SAFELIGHT_DATA isn't set: no MNIST and CIFAR-10 to test with")
    for item in items:
        if "data" in item.keywords and not DATA:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def clean_environ(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SAFELIGHT_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def data() -> Path:
    """The real data; tests that ask for it carry the mark `data`."""
    assert DATA
    return Path(DATA).resolve()


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """A folder with one good model, `greys@1`."""
    folder = tmp_path / "artifacts"
    make_bundle(folder)
    return folder


@pytest.fixture
def settings(artifacts: Path, tmp_path: Path) -> Settings:
    return Settings(artifacts=artifacts, state=tmp_path / "state", default_model="greys", rescan_seconds=0.1)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    """The whole application in this process, its lifespan included."""
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in `run`, its data in `squares`, and what it published, tiny@1, in `artifacts`. To read only."""
    torch.set_num_threads(2)
    root = tmp_path_factory.mktemp("tiny")
    data = write_class_folders(root / "squares", squares())
    runs.create(root / "run", runs.Plan(model="tiny", recipe=TINY, seed=0, dataset=str(data)))
    runs.execute(root / "run", runs.Options(artifacts=root / "artifacts"), lambda _: None, resume=False)
    return root


@pytest.fixture
def tiny(tiny_run: Path, tmp_path: Path) -> Path:
    """An artifacts folder with tiny@1, to do anything with."""
    return shutil.copytree(tiny_run / "artifacts", tmp_path / "artifacts", dirs_exist_ok=True)
