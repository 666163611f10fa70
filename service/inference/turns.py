"""The thread that engines compute in. Those that share a device take turns in it."""

import threading
import time
from collections.abc import Callable

from service.telemetry import logger

PAUSE = 0.1  # seconds, after a turn that failed: the next one may succeed

Turn = Callable[[], bool]  # do some of what there is to do; whether some is left


class EngineThread:
    """Whoever has joined gets one turn after another, in order, for as long as one of them has something to do."""

    def __init__(self) -> None:
        self._turns: tuple[Turn, ...] = ()  # replaced as a whole: the thread may be in the middle of them
        self._replacing = threading.Lock()
        self._device = threading.Lock()  # held for the length of a turn
        self._woken = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)  # holds up no exit
        self._thread.start()

    def join(self, turn: Turn) -> None:
        with self._replacing:
            self._turns = (*self._turns, turn)

    def leave(self, turn: Turn) -> None:
        with self._replacing:
            self._turns = tuple(other for other in self._turns if other != turn)

    def wake(self) -> None:
        """There is something to do."""
        self._woken.set()

    def take_here(self, turn: Turn) -> bool:
        """Take a turn in the caller's own thread, unless somebody has one; whether it was taken."""
        if not self._device.acquire(blocking=False):
            return False
        try:
            left = turn()
        finally:
            self._device.release()
        if left:
            self.wake()
        return True

    def close(self) -> None:
        """Return once the turn that is under way is over."""
        self._closed = True
        self._woken.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._closed:
            self._woken.wait()
            self._woken.clear()  # before looking: what comes meanwhile sets it again
            self._take_turns()

    def _take_turns(self) -> None:
        """One each. Not in `_work`, whose variables would keep the last one's engine while it waits."""
        for turn in self._turns:
            with self._device:
                left = _take(turn)
            if left:
                self._woken.set()


def _take(turn: Turn) -> bool:
    """The thread must outlive any turn."""
    try:
        return turn()
    except Exception:
        logger.exception("the engine's turn failed")
        time.sleep(PAUSE)
        return True
