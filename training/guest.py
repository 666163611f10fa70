"""A process that must not get in anybody's way: low priority, bounded memory, gone when its parent is."""

import fcntl
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training import SafelightError

LOCK = ".lock"


class FolderBusy(SafelightError):
    """Another process is at work in the run's folder."""


def step_back() -> None:
    """Take the processor only where nobody else wants it."""
    os.nice(19)


def limit_memory(size: int) -> None:
    """Of what is allocated; beyond that, MemoryError. Not of address space, which libraries reserve by the gigabyte."""
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def stop_at_eof() -> None:
    """As on SIGTERM once stdin ends, which it does when the parent that holds its other end dies, however it does."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1024):  # not through the buffer, whose lock would be in the way at the end
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True, name="parent").start()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a run's folder; the system lets go of it with the process, however that ends. Raises FolderBusy."""
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderBusy(f"another process is at work in {folder}; wait for it, or stop it first") from None
        yield
