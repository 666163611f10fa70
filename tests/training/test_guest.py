"""A process that stays out of the way: tried on processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

HELLO = "print('ready', flush=True); "


@pytest.mark.skipif(sys.platform != "linux", reason="what a process may allocate is limited on Linux")
def test_more_memory_than_allowed_is_an_error_and_not_a_swap() -> None:
    program = "from training import guest; guest.limit_memory(2**28); bytearray(2**29)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "MemoryError"


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has allocated is told on Linux")
def test_a_limit_that_leaves_too_little_to_begin_with_is_an_error_at_once() -> None:
    program = (
        "from training import guest; guest.limit_memory(2**28, least=2**20); guest.limit_memory(2**28, least=2**28)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "MemoryError: 268435456 bytes are less than is needed to begin"


LEFT = """
from training import guest
print(guest.memory_left())
guest.limit_memory(2**28)
left = guest.memory_left()
held = bytearray(2**27)
print(left < 2**28, 2**27 <= left - guest.memory_left() < 2**27 + 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has allocated is told on Linux")
def test_what_is_left_of_the_memory_is_known() -> None:
    told = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == ["inf", "True True"]


def test_a_guest_steps_back() -> None:
    program = "import os; from training import guest; guest.step_back(); print(os.nice(0))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "19\n"


def test_it_goes_when_its_parent_s_end_of_stdin_is_closed() -> None:
    program = "import signal; from training import guest; guest.stop_at_eof(); " + HELLO + "signal.pause()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(10) == -15


NICE = (
    "import os, pathlib, sys; from training import guest; guest.AUTOGROUP = pathlib.Path(sys.argv[1]); "
    "guest.step_back(); print(os.nice(0))"
)


def nice(group: Path, *, own_session: bool) -> str:
    """What a process that has stepped back says of its niceness; `group` stands for the file of its session's."""
    command = [sys.executable, "-c", NICE, str(group)]
    return subprocess.run(command, capture_output=True, text=True, check=True, start_new_session=own_session).stdout


@pytest.mark.parametrize(("own_session", "told"), [(True, "19"), (False, "as it was")])
def test_who_steps_back_does_so_among_sessions_too_but_only_for_itself(
    tmp_path: Path, own_session: bool, told: str
) -> None:
    group = tmp_path / "autogroup"
    group.write_text("as it was")
    assert (nice(group, own_session=own_session), group.read_text()) == ("19\n", told)


def test_who_steps_back_is_nice_also_where_no_sessions_are_grouped(tmp_path: Path) -> None:
    assert nice(tmp_path / "none" / "autogroup", own_session=True) == "19\n"


def test_the_system_takes_it_as_the_niceness_of_the_session() -> None:
    """Asked of a new session: this one may be in no group where the system has them all the same."""
    program = "from training import guest; {}; print(guest.AUTOGROUP.read_text() if guest.AUTOGROUP.exists() else '')"
    before, after = (
        subprocess.run(
            [sys.executable, "-c", program.format(step)],
            capture_output=True,
            text=True,
            check=True,
            start_new_session=True,
        ).stdout.split()
        for step in ("pass", "guest.step_back()")
    )
    if not before:
        pytest.skip("this system doesn't group processes by session")
    assert (before[1:], after[1:]) == (["nice", "0"], ["nice", "19"])
