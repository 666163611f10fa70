"""A process that must not get in anybody's way: low priority, bounded memory, gone when its parent is."""

import os
import resource
import signal
import sys
import threading


def step_back() -> None:
    """Take the processor only where nobody else wants it."""
    os.nice(19)


def limit_memory(size: int) -> None:
    """Of what is allocated; beyond that, MemoryError. Not of address space, which libraries reserve by the gigabyte."""
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def stop_at_eof() -> None:
    """As on SIGTERM once stdin ends, which it does when the parent that holds its other end dies, however it does."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True, name="parent").start()
