"""A process that is held and let go: tried on processes of their own."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

# Counts aloud until its standard input ends, and says then how long that took it. Like the log of events it writes
# without a buffer: it may be held in the middle of a line, and `print` can't be called within itself.
PROGRAM = """
import select, sys
from training.hold import holdable, working_time

out = open(1, "wb", buffering=0)

def say(word):
    out.write(f"{word}\\n".encode())

with holdable(lambda event: say(event.event)):
    begun, step = working_time(), 0
    while not select.select([sys.stdin], [], [], 0.02)[0]:
        step += 1
        say(step)
    say(f"{working_time() - begun:.3f}")
"""


@contextmanager
def counting() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert line(process) == "1"
        yield process
        process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def said_to_the_end(process: subprocess.Popen[str]) -> list[str]:
    """Let it come to its end; what it says until then."""
    said, _ = process.communicate()
    return said.split()


def hold(process: subprocess.Popen[str], counted: int = 1) -> int:
    """Hold it once it has said that it has counted so far; the last number that it counted to."""
    process.send_signal(signal.SIGTSTP)
    while (said := line(process)) != "held":
        counted = int(said)
    return counted


def test_a_held_run_waits_where_it_is_and_goes_on_when_told_to() -> None:
    with counting() as process:
        first = hold(process)
        time.sleep(0.5)
        process.send_signal(signal.SIGCONT)
        assert [line(process), line(process)] == ["released", str(first + 1)]
        second = hold(process, counted=first + 1)
        process.send_signal(signal.SIGCONT)
        assert [line(process), line(process)] == ["released", str(second + 1)]
        *rest, _ = said_to_the_end(process)
    assert [int(number) for number in rest] == list(range(second + 2, second + 2 + len(rest)))


def test_the_time_that_it_is_held_does_not_count() -> None:
    with counting() as process:
        begun = time.monotonic()
        hold(process)
        time.sleep(2)
        process.send_signal(signal.SIGCONT)
        assert line(process) == "released"
        last = 1
        while last < 40:
            last = int(line(process))
        *rest, worked = said_to_the_end(process)
        lived = time.monotonic() - begun
    steps = last + len(rest)
    assert float(worked) < lived - 1.9
    assert float(worked) > (steps - 1) * 0.02  # the wait that was interrupted is over when it is let go


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -15), (signal.SIGKILL, -9)])
def test_a_held_run_can_be_ended(number: signal.Signals, code: int) -> None:
    with counting() as process:
        hold(process)
        process.send_signal(number)
        assert process.wait(5) == code


def test_a_held_run_that_ends_by_a_signal_says_that_it_was_released() -> None:
    with counting() as process:
        hold(process)
        process.send_signal(signal.SIGINT)
        assert said_to_the_end(process) == ["released"]
    assert process.returncode == -signal.SIGINT
