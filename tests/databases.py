"""A PostgreSQL server that lives as long as the test run, and nobody else's."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

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
        address = f"postgresql://safelight@/postgres?host={folder}"
        while not _answers(address):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder)


def _answers(address: str) -> bool:
    try:
        psycopg.connect(address).close()
    except psycopg.OperationalError:
        return False
    return True


def new_schema(server: str) -> str:
    """A part of the PostgreSQL database that nobody has used yet."""
    name = f"test_{uuid4().hex}"
    with psycopg.connect(server) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    return f"{server}&options=-csearch_path%3D{name}"
