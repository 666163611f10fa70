"""What spans the life of the process: whether it wants new work (until SIGTERM), and what the collector may skip."""

import asyncio
import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

YOUNG_OBJECTS = 10_000  # between two looks at them; Python's own 700 are those of a few requests


@dataclass(eq=False)
class Lifecycle:
    draining: bool = False


@contextmanager
def drain_on_sigterm(lifecycle: Lifecycle, seconds: float) -> Iterator[None]:
    """At SIGTERM say so at once, go on answering for `seconds`, then let the server's own handler end it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread; a server inside another program's thread has none
        return
    loop = asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGTERM)

    def drain(number: int, frame: FrameType | None) -> None:
        lifecycle.draining = True
        if callable(before):
            loop.call_soon_threadsafe(loop.call_later, seconds, before, number, frame)

    signal.signal(signal.SIGTERM, drain)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Keep the garbage collector from what is there by now, and let it look at the rest, but more seldom.

    There are a quarter of a million objects, most of them torch's: to look through them would stop every request for
    0.15 s, every few seconds under load.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)
    gc.enable()  # `python -m service` starts without it
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
