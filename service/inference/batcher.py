"""Pictures of many requests become batches, and each request gets its own answers back.

Work-conserving: an idle engine starts at once with what is there, and while it runs, arrivals gather into the next
batch. No picture waits for company. What can't be held, or can't be in time, is refused at the door; what nobody waits
for any more, or comes too late after all, is dropped before it is computed.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.errors import DeadlineExceeded, InferenceFailed, QueueFull
from service.inference.sizes import FEW, size_within
from service.inference.turns import EngineThread
from service.telemetry import logger
from training.bundle.images import Pixels

REMEMBERED = 256  # pictures whose pace counts, or so: one that met a bad moment doesn't speak for the next
TURN = 0.02  # seconds, after which another engine may have the device
AT_ONCE = 0.001  # seconds that a lone picture may take to be computed on the event loop
BEGUN_WITH = 32  # pictures that the pace measured at load counts for

T = TypeVar("T")  # what comes of one picture
Run = Callable[[NDArray[np.uint8]], Sequence[T | InferenceFailed]]  # of [N, C, H, W]; in the engine's thread


class Meter(Protocol):
    """What the batcher reports: how many pictures are pending, and the size of each batch."""

    def pending(self, images: int) -> None: ...

    def batch(self, size: int) -> None: ...


class Pace:
    """Seconds a picture takes while there is work: decoding, waiting for the device and the event loop count too."""

    def __init__(self, seconds_per_image: float) -> None:
        self._seconds, self._images = seconds_per_image * BEGUN_WITH, float(BEGUN_WITH)
        self._since = time.perf_counter()

    def begin(self) -> None:
        """There is work, after there was none."""
        self._since = time.perf_counter()

    def done(self, images: int) -> None:
        now, kept = time.perf_counter(), math.exp(-images / REMEMBERED)
        self._seconds = kept * self._seconds + now - self._since
        self._images = kept * self._images + images
        self._since = now

    def seconds(self, images: int) -> float:
        return images * self._seconds / self._images


@dataclass(eq=False)
class Submission(Generic[T]):
    """The pictures of one request, and what came of them; times are in `perf_counter` seconds, which any thread may
    read, unlike the event loop's."""

    images: Sequence[Pixels]
    deadline: float
    submitted: float
    done: asyncio.Future[None]
    started: float | None = None  # when the first of them went to the engine
    finished: float = 0.0
    settled: dict[int, T | InferenceFailed] = field(default_factory=dict)

    @property
    def outcomes(self) -> list[T | InferenceFailed]:
        """In the order of `images`; whole once `done`."""
        return [self.settled[place] for place in range(len(self.images))]

    @property
    def abandoned(self) -> bool:
        return self.done.done()

    def settle(self, place: int, outcome: T | InferenceFailed, now: float) -> None:
        self.settled[place] = outcome
        if len(self.settled) == len(self.images) and not self.abandoned:
            self.finished = now
            self.done.set_result(None)

    def expire(self) -> None:
        if not self.abandoned:
            stage = "queue" if self.started is None else "infer"
            self.done.set_exception(DeadlineExceeded(f"the deadline passed in the {stage} stage", stage=stage))


Place = tuple[Submission[T], int]  # one picture of a request


def _settle(batch: list[Place[T]], outcomes: Sequence[T | InferenceFailed], now: float) -> None:
    for (submission, place), outcome in zip(batch, outcomes, strict=True):
        submission.settle(place, outcome, now)


class Batcher(Generic[T]):
    """One queue before one engine. The event loop appends, the engine's thread takes."""

    def __init__(
        self,
        run: Run[T],
        run_beside: Run[T],
        thread: EngineThread,
        *,
        max_batch: int,
        queue_size: int,
        seconds_per_image: float,
        lone_seconds: float,
        meter: Meter,
    ) -> None:
        """`run_beside` is for pictures of several requests: it may leave the event loop a processor to read more.
        `seconds_per_image` is of one picture among many, `lone_seconds` of one alone."""
        self._run, self._run_beside = run, run_beside
        self._thread = thread
        self._max_batch = max_batch
        self._queue_size = queue_size
        self._pace = Pace(seconds_per_image)
        self._lone_at_once = lone_seconds <= AT_ONCE
        self._meter = meter
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Place[T]] = deque()
        self._pending = 0
        self._knocking = 0  # requests that are about to come in
        self._alone = True  # the last batch was of one request
        self._beginning = False  # `_begin` is about to be called
        thread.join(self._take_turn)

    @contextmanager
    def admit(self, count: int, deadline: float) -> Iterator[None]:
        """Hold places for `count` pictures, from before they are decoded until they are answered. Raises QueueFull."""
        self.check_room(count, deadline)
        self._count(count)
        try:
            yield
        finally:
            self._count(-count)

    def check_room(self, count: int, deadline: float) -> None:
        """Raise QueueFull where `count` more pictures don't fit, or can't be answered by the deadline as things go."""
        self._check(count, self._pending, deadline)

    def knock(self, deadline: float) -> None:
        """The same for a request of one picture or more that is about to come in.

        The loop reads hundreds of heads before it goes on with any of their requests, so those that have knocked since
        it last did count as waiting.
        """
        self._check(1, self._pending + self._knocking, deadline)
        if not self._knocking:
            self._loop.call_soon(self._forget_knocks)  # it is before the first of their requests in the loop's queue
        self._knocking += 1

    def _forget_knocks(self) -> None:
        self._knocking = 0

    async def submit(self, images: Sequence[Pixels], deadline: float) -> Submission[T]:
        """Compute pictures [C, H, W]; returns when each has an outcome. Raises DeadlineExceeded.

        A caller that is cancelled takes its waiting pictures with it.
        """
        begun = time.perf_counter()
        submission: Submission[T] = Submission(
            images, begun + deadline - self._loop.time(), begun, self._loop.create_future()
        )
        places = [(submission, place) for place in range(len(images))]
        self._queue.extend(places)  # at once, for the engine's thread may be looking
        if not self._beginning:
            self._beginning = True
            self._loop.call_soon(self._begin)  # once the other requests that are ready have come this far
        expiry = self._loop.call_at(deadline, submission.expire)  # asyncio.timeout_at takes five times as long
        try:
            await submission.done
        finally:
            expiry.cancel()
            submission.done.cancel()  # no-op when it is done; else the queue drops what is left of it
        return submission

    async def close(self) -> None:
        """Answer what is queued, then stop."""
        await asyncio.sleep(0.01)  # for a request that has chosen this version and is about to be admitted
        while self._pending:
            await asyncio.sleep(0.01)
        self._thread.leave(self._take_turn)

    def _check(self, count: int, waiting: int, deadline: float) -> None:
        """Where nothing waits all are let in: the pace may have been that of a bad moment, and is measured again."""
        wait = self._pace.seconds(waiting)
        reason = None
        if waiting + count > self._queue_size:
            reason = f"{count} more don't fit: the limit is {self._queue_size}"
        elif waiting:
            left = deadline - self._loop.time()
            if wait + self._pace.seconds(count) > left:
                reason = f"{count} more wouldn't be done in the {max(0.0, left):.1f} s until their deadline"
        if reason:
            again = max(1, math.ceil(wait))
            raise QueueFull(
                f"{waiting} pictures are waiting and {reason}; try again in {again} s",
                retry_after=wait,
                limit=self._queue_size,
                pending=waiting,
            )

    def _count(self, change: int) -> None:
        if not self._pending:
            self._pace.begin()
        self._pending += change
        self._meter.pending(self._pending)

    def _begin(self) -> None:
        """Wake the engine's thread, but for a picture that is alone, as the request before was: to hand it over and
        back takes longer than to wait for it. Where there are others, they can be read meanwhile."""
        self._beginning = False
        lone = self._lone_at_once and self._alone and len(self._queue) == 1
        if not (lone and self._thread.take_here(self._take_one)):
            self._thread.wake()

    def _take_turn(self) -> bool:
        """Batch after batch, until the queue is empty or it is another engine's turn; whether anything is left.

        The event loop has requests to read: if it handed over batch by batch, the engine would wait for it after each.
        """
        end = time.perf_counter() + TURN
        while batch := self._next_batch():
            outcomes = self._run_batch(batch)
            now = time.perf_counter()
            self._loop.call_soon_threadsafe(_settle, batch, outcomes, now)
            if now >= end:
                break
        return bool(self._queue)

    def _take_one(self) -> bool:
        """A turn on the event loop."""
        if batch := self._next_batch():
            _settle(batch, self._run_batch(batch), time.perf_counter())
        return bool(self._queue)

    def _next_batch(self) -> list[Place[T]]:
        """Take what somebody still waits for and can still be in time.

        Of several requests no more than half of what waits, beyond a few: some are read and answered while others are
        computed.
        """
        batch: list[Place[T]] = []
        now, waiting = time.perf_counter(), len(self._queue)
        several = waiting > 0 and self._queue[0][0] is not self._queue[-1][0]
        most = min(self._max_batch, max(FEW, waiting // 2) if several else waiting)
        while self._queue and len(batch) < most:
            submission, place = self._queue.popleft()
            if submission.abandoned or submission.deadline <= now:
                continue  # past its deadline: the waiting side says so by itself
            batch.append((submission, place))
        size = size_within(len(batch))
        self._queue.extendleft(reversed(batch[size:]))
        return batch[:size]

    def _run_batch(self, batch: list[Place[T]]) -> Sequence[T | InferenceFailed]:
        """One outcome for each picture, come what may: nobody may wait in vain."""
        images = [submission.images[place] for submission, place in batch]
        begun = time.perf_counter()
        alone, before = all(submission is batch[0][0] for submission, _ in batch), self._alone
        self._alone = alone
        for submission, _ in batch:
            submission.started = submission.started or begun
        try:
            outcomes = self._compute(self._run if alone and before else self._run_beside, images)
            self._pace.done(len(batch))
            self._meter.batch(len(batch))
        except Exception as error:
            logger.exception("a batch failed outside the engine")
            return [InferenceFailed(f"the batch of this picture failed ({type(error).__name__})")] * len(batch)
        return outcomes

    def _compute(self, run: Run[T], images: list[Pixels]) -> Sequence[T | InferenceFailed]:
        """Run a batch; where it fails, halve it until only the guilty pictures fail."""
        try:
            outcomes = run(np.array(images))
            if len(outcomes) != len(images):
                raise ValueError(f"the engine answered {len(images)} pictures with {len(outcomes)} rows")
        except Exception as error:  # whatever the engine's library raises
            failure = error
        else:
            return outcomes
        if len(images) > 1:
            half = len(images) // 2
            return [*self._compute(run, images[:half]), *self._compute(run, images[half:])]
        logger.error("the engine failed on a picture", exc_info=failure)
        return [InferenceFailed(f"the model failed on this picture ({type(failure).__name__})")]
