import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.errors import DeadlineExceeded, InferenceFailed, QueueFull
from service.inference.batcher import AT_ONCE, TURN, Batcher, Submission
from service.inference.turns import EngineThread

POISON = 255


@dataclass
class Engine:
    """A run function to batch for: answers each picture with its own value, can be held, fails on poison."""

    sizes: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)
    rows_short: int = 0
    sizes_beside: list[int] = field(default_factory=list)

    def beside(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.sizes_beside.append(len(images))
        return self(images)

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.begun.set()
        assert self.go.wait(10)
        values = images[:, 0, 0, 0].astype(int)
        self.sizes.append(len(values))
        self.threads.append(threading.get_ident())
        if POISON in values:
            raise RuntimeError("poisoned")
        self.computed.extend(values.tolist())
        rows = np.stack([values, -values], axis=1).astype(np.float32)
        return rows[self.rows_short :]


@dataclass
class Meter:
    batches: list[int] = field(default_factory=list)
    last_pending: int = 0
    broken: bool = False

    def pending(self, images: int) -> None:
        self.last_pending = images

    def batch(self, size: int) -> None:
        if self.broken:
            raise OSError("No space left on device")  # metrics of several workers are files
        self.batches.append(size)


@dataclass
class Bench:
    batcher: Batcher
    engine: Engine
    meter: Meter

    async def ask(self, *values: int, seconds: float = 10) -> list[float]:
        """Admit, submit, and read the answers back as the values that they came from; -1 for a failure."""
        images = [np.full((1, 2, 2), value, np.uint8) for value in values]
        deadline = asyncio.get_running_loop().time() + seconds
        with self.batcher.admit(len(images), deadline):
            submission = await self.batcher.submit(images, deadline)
        return answers(submission)

    async def settle(self) -> None:
        """Let everything that can happen without the engine happen, the start of a first batch included."""
        for _ in range(10):
            await asyncio.sleep(0)
        assert await asyncio.to_thread(self.engine.begun.wait, 10)

    async def rest(self) -> None:
        """Until the engine's thread, which answers before its turn is over, waits for work again."""
        thread, quiet = self.batcher._thread, 0
        while quiet < 3:
            await asyncio.sleep(0.005)
            quiet = 0 if thread._woken.is_set() or thread._device.locked() else quiet + 1


def answers(submission: Submission) -> list[float]:
    return [-1.0 if isinstance(row, InferenceFailed) else float(row[0]) for row in submission.outcomes]


def run(
    test: Callable[[Bench], Awaitable[None]],
    *,
    held: bool = False,
    max_batch: int = 8,
    queue_size: int = 64,
    seconds_per_image: float = 0.0,
    lone_seconds: float = 1.0,
) -> Bench:
    """Run an async test on a fresh batcher; a held engine waits for `go`."""
    engine, meter = Engine(), Meter()
    if not held:
        engine.go.set()

    async def main() -> Bench:
        with closing(EngineThread()) as thread:
            batcher = Batcher(
                engine,
                engine.beside,
                thread,
                max_batch=max_batch,
                queue_size=queue_size,
                seconds_per_image=seconds_per_image,
                lone_seconds=lone_seconds,
                meter=meter,
            )
            bench = Bench(batcher, engine, meter)
            try:
                await test(bench)
            finally:
                engine.go.set()
                await batcher.close()
            return bench

    return asyncio.run(main())


def test_an_idle_engine_starts_at_once_and_arrivals_gather_while_it_runs() -> None:
    async def test(bench: Bench) -> None:
        first = asyncio.create_task(bench.ask(1))
        await bench.settle()
        others = [asyncio.create_task(bench.ask(value)) for value in (2, 3, 4)]
        await bench.settle()
        bench.engine.go.set()
        assert await asyncio.gather(first, *others) == [[1], [2], [3], [4]]

    assert run(test, held=True).meter.batches == [1, 3]


def test_a_picture_that_is_alone_as_the_request_before_was_is_computed_on_the_event_loop_where_that_is_quick() -> None:
    here = threading.get_ident()

    async def test(bench: Bench) -> None:
        assert await bench.ask(1) == [1]
        assert bench.engine.threads == [here]
        assert await bench.ask(2, 3) == [2, 3]
        await bench.rest()
        assert await asyncio.gather(bench.ask(4), bench.ask(5)) == [[4], [5]]
        assert await bench.ask(6) == [6]  # after others more may come: they are read meanwhile
        await bench.rest()
        assert await bench.ask(POISON) == [-1]
        assert await bench.ask(7) == [7]

    bench = run(test, lone_seconds=AT_ONCE)
    assert bench.engine.sizes == [1, 2, 2, 1, 1, 1]
    assert [thread == here for thread in bench.engine.threads] == [True, False, False, False, True, True]
    assert bench.meter.batches == [1, 2, 2, 1, 1, 1]

    async def slow(bench: Bench) -> None:
        assert await bench.ask(1) == [1]

    assert run(slow, lone_seconds=2 * AT_ONCE).engine.threads != [here]


def test_all_processors_are_for_requests_that_are_alone() -> None:
    async def test(bench: Bench) -> None:
        assert await bench.ask(1, 2, 3) == [1, 2, 3]
        assert await bench.ask(*range(20)) == [*range(20)]  # batch after batch of the same request
        assert bench.engine.sizes_beside == []
        await bench.rest()
        assert await asyncio.gather(bench.ask(4, 5), bench.ask(6)) == [[4, 5], [6]]
        assert await bench.ask(7) == [7]  # there were others a moment ago
        assert bench.engine.sizes_beside == [3, 1]
        assert await bench.ask(8) == [8]
        assert bench.engine.sizes_beside == [3, 1]

    assert run(test).engine.sizes == [3, 8, 8, 4, 3, 1, 1]


def test_a_picture_that_comes_while_the_engine_is_busy_never_holds_up_the_event_loop() -> None:
    here = threading.get_ident()

    async def test(bench: Bench) -> None:
        first = asyncio.create_task(bench.ask(1, 2))
        await bench.settle()
        second = asyncio.create_task(bench.ask(3))
        await bench.settle()  # would not return if the loop had waited for the engine
        bench.engine.go.set()
        assert await asyncio.gather(first, second) == [[1, 2], [3]]

    assert here not in run(test, held=True, lone_seconds=0).engine.threads


def test_a_batch_holds_no_more_than_its_limit() -> None:
    async def test(bench: Bench) -> None:
        assert await bench.ask(*range(20)) == list(range(20))

    assert run(test, max_batch=8).meter.batches == [8, 8, 4]


def test_a_large_batch_has_one_of_few_sizes() -> None:
    async def test(bench: Bench) -> None:
        assert await bench.ask(*range(61)) == list(range(61))

    assert run(test, max_batch=32).meter.batches == [32, 16, 8, 5]
    assert run(test, max_batch=31).meter.batches == [16, 16, 16, 8, 5]
    assert run(test, max_batch=7).meter.batches == [7] * 8 + [5]


def test_of_several_requests_half_of_what_waits_is_computed_at_once() -> None:
    async def test(bench: Bench) -> None:
        first = asyncio.create_task(bench.ask(1))
        await bench.settle()
        others = [asyncio.create_task(bench.ask(*range(start, start + 20))) for start in (10, 40)]
        await bench.settle()
        bench.engine.go.set()
        assert await asyncio.gather(first, *others) == [[1], [*range(10, 30)], [*range(40, 60)]]

    # Of 40 that wait 16, of 24 8, and of 16, which are one request's by then, all.
    assert run(test, held=True, max_batch=32).meter.batches == [1, 16, 8, 16]


def test_pictures_that_nobody_waits_for_leave_a_batch_of_another_size_and_the_rest_for_the_next() -> None:
    async def test(bench: Bench) -> None:
        first = asyncio.create_task(bench.ask(1))
        await bench.settle()
        gone, stays = (asyncio.create_task(bench.ask(*range(start, start + 20))) for start in (10, 40))
        await bench.settle()
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        bench.engine.go.set()
        assert await asyncio.gather(first, stays) == [[1], [*range(40, 60)]]

    # Of 40 that wait 20 may be taken, and 20 are alive: 16 of them.
    assert run(test, held=True, max_batch=32).meter.batches == [1, 16, 4]


def test_a_full_queue_refuses_with_the_time_to_wait_and_admits_again_afterwards() -> None:
    async def test(bench: Bench) -> None:
        waiting = asyncio.create_task(bench.ask(*range(6)))
        await bench.settle()
        with pytest.raises(QueueFull) as refusal:
            await bench.ask(1, 2, 3)
        assert refusal.value.retry_after == 6 * 0.5
        assert refusal.value.facts == {"limit": 8, "pending": 6}
        assert str(refusal.value) == ("6 pictures are waiting and 3 more don't fit: the limit is 8; try again in 3 s")
        bench.engine.go.set()
        await waiting
        assert await bench.ask(1, 2, 3) == [1, 2, 3]

    assert run(test, held=True, queue_size=8, seconds_per_image=0.5).meter.last_pending == 0


def test_of_those_that_knock_in_one_turn_no_more_are_let_in_than_there_are_places() -> None:
    async def test(bench: Bench) -> None:
        told: list[dict[str, object]] = []

        def let_in(knocks: int) -> int:
            for number in range(knocks):
                try:
                    bench.batcher.knock(asyncio.get_running_loop().time() + 10)
                except QueueFull as refusal:
                    told.append(refusal.facts)
                    return number
            return knocks

        waiting = asyncio.create_task(bench.ask(*range(5)))
        await bench.settle()
        one = asyncio.create_task(bench.ask(5))
        assert let_in(4) == 3
        await asyncio.sleep(0)
        assert let_in(4) == 2  # one has come in, the others' pictures are on their way
        bench.engine.go.set()
        assert await asyncio.gather(waiting, one) == [[0, 1, 2, 3, 4], [5]]
        assert told == [{"limit": 8, "pending": 8}] * 2

    run(test, held=True, queue_size=8)


def test_who_can_not_be_in_time_is_told_at_the_door_and_who_can_is_let_in() -> None:
    async def test(bench: Bench) -> None:
        waiting = asyncio.create_task(bench.ask(*range(6)))
        await bench.settle()
        with pytest.raises(QueueFull) as refusal:
            await bench.ask(1, 2, seconds=3.9)
        assert (refusal.value.retry_after, refusal.value.facts) == (6 * 0.5, {"limit": 64, "pending": 6})
        assert str(refusal.value) == (
            "6 pictures are waiting and 2 more wouldn't be done in the 3.9 s until their deadline; try again in 3 s"
        )
        in_time = asyncio.create_task(bench.ask(1, 2, seconds=4.1))
        await bench.settle()
        bench.engine.go.set()
        assert await asyncio.gather(waiting, in_time) == [[0, 1, 2, 3, 4, 5], [1, 2]]

    assert run(test, held=True, seconds_per_image=0.5).engine.computed == [0, 1, 2, 3, 4, 5, 1, 2]


def test_where_nothing_waits_a_request_is_tried_however_slow_the_engine_was() -> None:
    async def test(bench: Bench) -> None:
        assert await bench.ask(1, seconds=10) == [1]

    run(test, seconds_per_image=60)


def test_one_picture_that_met_a_bad_moment_does_not_speak_for_the_next() -> None:
    async def test(bench: Bench) -> None:
        bench.engine.go.clear()
        held = asyncio.create_task(bench.ask(1))
        await asyncio.sleep(0.3)
        bench.engine.go.set()
        await held
        bench.engine.go.clear()
        waiting = [asyncio.create_task(bench.ask(value, seconds=5)) for value in range(32)]
        await bench.settle()
        bench.engine.go.set()
        assert await asyncio.gather(*waiting) == [[value] for value in range(32)]

    run(test)


def test_a_deadline_that_passes_in_the_queue_names_the_queue_and_nothing_is_computed() -> None:
    async def test(bench: Bench) -> None:
        running = asyncio.create_task(bench.ask(1))
        await bench.settle()
        with pytest.raises(DeadlineExceeded) as late:
            await bench.ask(2, seconds=0.02)
        assert (str(late.value), late.value.facts) == ("the deadline passed in the queue stage", {"stage": "queue"})
        bench.engine.go.set()
        assert await running == [1]
        assert await bench.ask(3) == [3]

    assert run(test, held=True).engine.computed == [1, 3]


def test_a_deadline_that_passes_in_the_engine_names_inference() -> None:
    async def test(bench: Bench) -> None:
        with pytest.raises(DeadlineExceeded) as late:
            await bench.ask(1, seconds=1)
        assert late.value.facts == {"stage": "infer"}

    assert run(test, held=True).meter.last_pending == 0


def test_pictures_of_a_caller_who_left_are_not_computed() -> None:
    async def test(bench: Bench) -> None:
        running = asyncio.create_task(bench.ask(1))
        await bench.settle()
        leaving, staying = asyncio.create_task(bench.ask(2, 3)), asyncio.create_task(bench.ask(4))
        await bench.settle()
        leaving.cancel()
        await bench.settle()
        assert bench.meter.last_pending == 2
        bench.engine.go.set()
        assert (await running, await staying) == ([1], [4])

    assert run(test, held=True).engine.computed == [1, 4]


def test_only_the_guilty_picture_of_a_failing_batch_fails() -> None:
    async def test(bench: Bench) -> None:
        first = asyncio.create_task(bench.ask(9))
        await bench.settle()
        mixed = [asyncio.create_task(bench.ask(*values)) for values in ((1, 2), (3, POISON), (4,), (5, 6))]
        await bench.settle()
        bench.engine.go.set()
        await first
        assert await asyncio.gather(*mixed) == [[1, 2], [3, -1], [4], [5, 6]]

    assert run(test, held=True).engine.sizes == [1, 7, 3, 4, 2, 1, 1, 2]


def test_an_engine_that_answers_with_too_few_rows_fails_its_pictures_and_the_next_ones_are_answered() -> None:
    async def test(bench: Bench) -> None:
        bench.engine.rows_short = 1
        assert await bench.ask(1, 2) == [-1, -1]
        bench.engine.rows_short = 0
        assert await bench.ask(3) == [3]

    run(test)


def test_an_error_beside_the_engine_fails_its_batch_is_logged_and_does_not_stop_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(bench: Bench) -> None:
        bench.meter.broken = True
        submission = await bench.batcher.submit([np.zeros((1, 2, 2), np.uint8)], asyncio.get_running_loop().time() + 9)
        assert str(submission.outcomes[0]) == "the batch of this picture failed (OSError)"
        bench.meter.broken = False
        assert await bench.ask(3) == [3]

    run(test)
    assert caplog.messages == ["a batch failed outside the engine"]
    assert "No space left on device" in caplog.text


def test_the_wait_is_told_from_the_measured_rate() -> None:
    async def test(bench: Bench) -> None:
        for _ in range(60):
            await bench.ask(*range(8))
        bench.engine.go.clear()
        waiting = asyncio.create_task(bench.ask(*range(8)))
        await bench.settle()
        with pytest.raises(QueueFull) as refusal:
            await bench.ask(1)
        assert refusal.value.retry_after < 0.1 * 8 * 0.5  # it began with the 0.5 s a picture that it was told at load
        bench.engine.go.set()
        await waiting

    run(test, queue_size=8, seconds_per_image=0.5)


def test_closing_answers_what_was_admitted() -> None:
    async def test(bench: Bench) -> None:
        waiting = asyncio.create_task(bench.ask(1, 2, 3))
        await bench.settle()
        closing = asyncio.create_task(bench.batcher.close())
        await bench.settle()
        bench.engine.go.set()
        assert await waiting == [1, 2, 3]
        await closing

    run(test, held=True)


def test_two_engines_on_one_device_take_turns() -> None:
    async def main() -> list[str]:
        order: list[str] = []

        def engine(name: str) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
            def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
                order.append(name)
                time.sleep(TURN)
                return np.zeros((len(images), 2), np.float32)

            return run

        with closing(EngineThread()) as thread:
            batchers = {
                name: Batcher(
                    engine(name),
                    engine(name),
                    thread,
                    max_batch=1,
                    queue_size=99,
                    seconds_per_image=0,
                    lone_seconds=1,
                    meter=Meter(),
                )
                for name in "ab"
            }
            images = [np.zeros((1, 2, 2), np.uint8)] * 4
            later = asyncio.get_running_loop().time() + 10
            await asyncio.gather(*(batcher.submit(images, later) for batcher in batchers.values()))
            for batcher in batchers.values():
                await batcher.close()
        return order

    assert asyncio.run(main()) == ["a", "b"] * 4


requests = st.lists(
    st.tuples(
        st.lists(st.sampled_from([*range(1, 20), POISON]), min_size=1, max_size=5),
        st.sampled_from(["stay", "stay", "leave"]),
        st.integers(0, 2),  # turns of the event loop before the next request comes
    ),
    max_size=15,
)


@given(
    requests=requests,
    max_batch=st.integers(1, 7),
    queue_size=st.integers(5, 20),
    lone_seconds=st.sampled_from([0.0, 1.0]),
)
@hypothesis_settings(deadline=None, max_examples=100)
def test_whatever_comes_and_goes_each_caller_gets_its_own_answers(
    requests: list[tuple[list[int], str, int]], max_batch: int, queue_size: int, lone_seconds: float
) -> None:
    async def test(bench: Bench) -> None:
        tasks = []
        for values, fate, turns in requests:
            task = asyncio.create_task(bench.ask(*values))
            tasks.append((values, fate, task))
            for _ in range(turns):
                await asyncio.sleep(0)
            if fate == "leave":
                task.cancel()
        for values, fate, task in tasks:
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(outcome, list):
                assert outcome == [-1.0 if value == POISON else value for value in values]
            else:
                assert isinstance(outcome, QueueFull if fate == "stay" else (QueueFull, asyncio.CancelledError))

    bench = run(test, max_batch=max_batch, queue_size=queue_size, lone_seconds=lone_seconds)
    assert bench.meter.last_pending == 0
    assert all(size <= max_batch for size in bench.engine.sizes)
