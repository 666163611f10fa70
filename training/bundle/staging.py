"""Private folders to write in, which are gone with the process that made them, however it ends.

Their maker holds a lock in them for as long as it lives. Whoever makes the next one beside them takes away those that
nobody holds any more.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

LOCK = ".lock"
CONTENT = "content"


@contextmanager
def private_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """An empty folder on the disk of `parent`; it is removed at the end, unless it was renamed to its place."""
    for left in parent.glob(f"{prefix}*"):
        _remove_unless_held(left)
    lock = None
    while lock is None:  # it may be taken for a leftover in the moment before it is locked
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = _claim(folder)
    with lock:
        try:
            (folder / CONTENT).mkdir()
            yield folder / CONTENT
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_unless_held(folder: Path) -> None:
    with suppress(OSError):  # another user's
        if (lock := _claim(folder)) is not None:
            with lock:
                shutil.rmtree(folder, ignore_errors=True)


def _claim(folder: Path) -> IO[str] | None:
    """The folder's lock, held; None where another has it, or has just taken the folder away. Raises OSError."""
    with suppress(FileNotFoundError):
        lock = (folder / LOCK).open("w")
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / LOCK)):
                return lock
        lock.close()
    return None
