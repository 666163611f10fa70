"""Whether this process wants new work: yes, until SIGTERM."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


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
