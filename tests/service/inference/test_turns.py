import threading
import weakref
from contextlib import closing

import pytest

from service.inference.turns import EngineThread


def test_who_has_more_to_do_gets_its_next_turn_after_the_others() -> None:
    order: list[str] = []
    left = {"a": 3, "b": 1, "c": 2}
    done = threading.Event()

    def work(name: str) -> bool:
        if left[name]:
            order.append(name)
            left[name] -= 1
        if not any(left.values()):
            done.set()
        return left[name] > 0

    with closing(EngineThread()) as thread:
        for name in "abc":
            thread.join(lambda name=name: work(name))  # type: ignore[misc]
        thread.wake()
        assert done.wait(10)
    assert order == ["a", "b", "c", "a", "c", "a"]


def test_a_turn_that_fails_is_logged_and_taken_again_and_the_others_have_theirs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    order: list[str] = []
    done = threading.Event()

    def fail_once() -> bool:
        order.append("failing")
        if len(order) == 1:
            raise MemoryError("no room")
        done.set()
        return False

    def succeed() -> bool:
        order.append("other")
        return False

    with closing(EngineThread()) as thread:
        thread.join(fail_once)
        thread.join(succeed)
        thread.wake()
        assert done.wait(10)
    assert order[:3] == ["failing", "other", "failing"]
    assert caplog.messages == ["the engine's turn failed"]
    assert "no room" in caplog.text


def test_who_has_left_gets_no_turn_and_a_closed_thread_is_gone() -> None:
    order: list[str] = []
    done = threading.Event()

    def leaving() -> bool:
        order.append("leaving")
        return False

    def staying() -> bool:
        order.append("staying")
        done.set()
        return False

    thread = EngineThread()
    thread.join(leaving)
    thread.join(staying)
    thread.leave(leaving)
    thread.wake()
    assert done.wait(10)
    thread.close()
    assert set(order) == {"staying"}
    assert "engine" not in [running.name for running in threading.enumerate()]


def test_the_thread_keeps_nothing_of_who_has_left() -> None:
    """An unloaded version's engine, of perhaps a gigabyte."""
    had_a_turn, gone = threading.Event(), threading.Event()

    class Worker:
        def take_turn(self) -> bool:
            had_a_turn.set()
            return False

    with closing(EngineThread()) as thread:
        worker = Worker()
        weakref.finalize(worker, gone.set)
        thread.join(worker.take_turn)
        thread.wake()
        assert had_a_turn.wait(10)
        thread.leave(worker.take_turn)
        del worker
        assert gone.wait(10)


def test_a_turn_is_taken_in_the_callers_thread_only_while_nobody_else_has_one() -> None:
    here, threads = threading.get_ident(), []
    begun, go, again = threading.Event(), threading.Event(), threading.Event()

    def long() -> bool:
        begun.set()
        assert go.wait(10)
        return False

    def unfinished() -> bool:
        threads.append(threading.get_ident())
        if len(threads) > 1:
            again.set()
        return len(threads) == 1

    with closing(EngineThread()) as thread:
        thread.join(long)
        thread.wake()
        assert begun.wait(10)
        assert not thread.take_here(unfinished)
        thread.leave(long)
        go.set()
        thread.join(unfinished)
        while not thread.take_here(unfinished):
            again.wait(0.001)
        assert again.wait(10)  # what it left is done by the thread
    assert threads[0] == here
    assert here not in threads[1:]
