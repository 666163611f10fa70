"""What keeps a run from being a burden: low priority, limits, and an end when whoever started it is gone."""

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


def yield_to_others() -> None:
    """Run at the lowest priority: whatever else wants a processor gets it first."""
    os.nice(19)


def limit_memory(limit: int) -> None:
    """Have allocations beyond this many bytes fail, instead of bringing the machine down.

    Of private, writable memory: what is mapped from files, or merely reserved, doesn't count.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def stop_at_eof() -> None:
    """End as on SIGTERM once standard input ends: then whoever started this and held the other end has died."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1024):  # not through the buffer, whose lock would be in the way at the end
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a run's folder; the system lets go of it with the process, however that ends. Raises FolderBusy."""
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderBusy(f"another process is at work in {folder}; wait for it, or stop it first") from None
        yield
