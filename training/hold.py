"""A run that can be held: from SIGTSTP to SIGCONT it waits where it is, memory and all, and that time doesn't count."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from training import events

LOOK_SECONDS = 0.02
WAKING = (signal.SIGCONT, signal.SIGTERM, signal.SIGINT)

_held_seconds = 0.0


def working_time() -> float:
    """Seconds as `time.perf_counter` counts them, but for those that the run was held."""
    return time.perf_counter() - _held_seconds


@contextmanager
def holdable(tell: Callable[[events.Event], None]) -> Iterator[None]:
    """Let SIGTSTP hold what runs in the main thread; SIGTERM and SIGINT end the wait and have their usual effect.

    `tell` is called amid whatever that is, also in the middle of itself: it must write without a buffer.

    A shell's Ctrl-Z would hold a process by itself; one whose parent isn't a shell is not stopped by the system, and
    once stopped it couldn't notice that its parent is gone.
    """

    def hold(*_: object) -> None:
        global _held_seconds
        begun = time.perf_counter()
        woken: list[int] = []
        before = {number: signal.signal(number, lambda number, _: woken.append(number)) for number in WAKING}
        tell(events.Held())
        while not woken:
            time.sleep(LOOK_SECONDS)
        for signalled, handler in before.items():
            signal.signal(signalled, handler)
        _held_seconds += time.perf_counter() - begun
        tell(events.Released())
        for number in set(woken) - {signal.SIGCONT}:
            signal.raise_signal(number)

    before = signal.signal(signal.SIGTSTP, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)
