"""Databases to keep jobs in: SQLite's file, and a PostgreSQL that lives as long as the test run."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from service.jobs.job import Order
from service.jobs.store import JobStore

NOBODY = "nobody"


def program(name: str) -> str | None:
    """A program of PostgreSQL's server, which Debian keeps off the path."""
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    return str(installed[0]) if installed else shutil.which(name)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of a PostgreSQL server of our own, on a socket in a folder of its own."""
    initdb, server = program("initdb"), program("postgres")
    if initdb is None or server is None:
        pytest.skip("PostgreSQL isn't installed: no initdb and postgres in /usr/lib/postgresql/*/bin or on the path")
    as_nobody = ["setpriv", "--reuid", NOBODY, "--regid", "nogroup", "--clear-groups"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path can't be longer than 107 characters
    if as_nobody:
        shutil.chown(folder, NOBODY)
    data, log = folder / "data", folder / "log"
    quick = ["-c", "fsync=off", "-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}"]
    subprocess.run(
        [*as_nobody, initdb, "-D", data, "-U", "safelight", "--auth", "trust", "--no-sync", "--locale", "C.UTF-8"],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    with log.open("w") as output:
        process = subprocess.Popen([*as_nobody, server, "-D", data, *quick], stdout=output, stderr=output, cwd=folder)
    try:
        while not (folder / ".s.PGSQL.5432").exists():
            assert process.poll() is None, log.read_text()
        yield f"postgresql+psycopg://safelight@/postgres?host={folder}"
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    return new_schema(request.getfixturevalue("postgres"))


def new_schema(server: str) -> str:
    """A part of the PostgreSQL database that nobody has used yet."""
    import psycopg

    name = f"test_{uuid4().hex}"
    with psycopg.connect(server.replace("+psycopg", "")) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    return f"{server}&options=-csearch_path%3D{name}"


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


def order(**changes: object) -> Order:
    asked = {"model": "greys", "version": "1", "name": "shades", "dataset": "ds-1", "seed": 0, "promote": "if_better"}
    return Order.model_validate(asked | {"recipe": {}} | changes)
