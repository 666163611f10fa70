"""Private folders: tried by processes that are killed in them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from training.bundle import store
from training.bundle.staging import private_folder

STAGER = """
import sys
from pathlib import Path
from training.bundle import store
with store.staging(Path(sys.argv[1]), "greys") as folder:
    (folder / "model.ts").write_bytes(b"half a mod")
    print(folder.parent, flush=True)
    sys.stdin.read()
"""


@contextmanager
def staging_process(root: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that is busy writing a version of greys, and the folder that it writes in."""
    command = [sys.executable, "-c", STAGER, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_what_a_killed_process_was_writing_goes_when_the_next_one_writes(tmp_path: Path) -> None:
    with staging_process(tmp_path) as (process, left):
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (left / "content" / "model.ts").read_bytes() == b"half a mod"
    with store.staging(tmp_path, "greys") as folder:
        assert list((tmp_path / "greys").iterdir()) == [folder.parent]
    assert list((tmp_path / "greys").iterdir()) == []


def test_what_a_living_process_is_writing_is_let_alone(tmp_path: Path) -> None:
    with staging_process(tmp_path) as (process, theirs):
        with store.staging(tmp_path, "greys") as folder:
            assert set((tmp_path / "greys").iterdir()) == {theirs, folder.parent}
        assert (theirs / "content" / "model.ts").exists()
        process.communicate()
    assert (process.returncode, list((tmp_path / "greys").iterdir())) == (0, [])


def test_threads_that_write_at_once_never_take_each_others_folder(tmp_path: Path) -> None:
    def write(number: int) -> bool:
        with private_folder(tmp_path, ".staging-") as folder:
            (folder / "mine").write_text(str(number))
            return os.listdir(folder) == ["mine"] and (folder / "mine").read_text() == str(number)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write, range(400)))
    assert os.listdir(tmp_path) == []


def test_what_only_looks_alike_is_let_alone(tmp_path: Path) -> None:
    (tmp_path / ".staging-notes").write_text("mine")
    (tmp_path / ".stagings").mkdir()
    with private_folder(tmp_path, ".staging-"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".staging-notes", ".stagings"]


def test_what_was_written_in_vain_is_removed(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), private_folder(tmp_path, ".staging-"):
        raise OSError("disk full")
    assert os.listdir(tmp_path) == []
