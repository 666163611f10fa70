"""A process that must not get in anybody's way: low priority, bounded memory, gone when its parent is."""

import fcntl
import math
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from training import SafelightError

LOCK = ".lock"
STATM = Path("/proc/self/statm")
AUTOGROUP = Path("/proc/self/autogroup")
NICEST = 19


class FolderBusy(SafelightError):
    """Another process is at work in the run's folder."""


def step_back() -> None:
    """Take the processor only where nobody else wants it.

    Where Linux groups processes by session (`sched_autogroup`), niceness counts within a session alone, and sessions
    have their own. That is set too, but for a session of our own: else a person's shell would be nice from then on.
    """
    os.nice(NICEST)
    if os.getsid(0) == os.getpid():
        with suppress(OSError):  # no such groups, or no right to change one
            AUTOGROUP.write_text(str(NICEST))


def limit_memory(size: int, least: int = 0) -> None:
    """Of what is allocated; beyond that, MemoryError, and at once where that would leave less than `least`.

    Not of address space, which libraries reserve by the gigabyte.
    """
    if _allocated() + least > size:
        raise MemoryError(f"{size} bytes are less than is needed to begin")
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def memory_left() -> float:
    """Bytes that may still be allocated; infinite where there is no limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return math.inf if limit == resource.RLIM_INFINITY else limit - _allocated()


def _allocated() -> int:
    """Bytes of what RLIMIT_DATA limits, with the stack; 0 where the system doesn't say."""
    with suppress(OSError):
        return int(STATM.read_text().split()[5]) * resource.getpagesize()
    return 0


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
