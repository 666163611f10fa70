"""A process that stays out of the way: tried on processes of their own."""

import subprocess
import sys

import pytest

from training import guest

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


NICE = "import os; from training import guest; guest.step_back(); print(os.nice(0), guest.AUTOGROUP.read_text())"
NICE_WITHOUT_GROUPS = (
    "import os, pathlib; from training import guest; guest.AUTOGROUP = pathlib.Path('/proc/none'); "
    "guest.step_back(); print(os.nice(0))"
)


def test_who_steps_back_is_nice_also_where_no_sessions_are_grouped() -> None:
    command = [sys.executable, "-c", NICE_WITHOUT_GROUPS]
    assert subprocess.run(command, capture_output=True, text=True, check=True, start_new_session=True).stdout == "19\n"


@pytest.mark.skipif(not guest.AUTOGROUP.exists(), reason="this system doesn't group processes by session")
def test_who_steps_back_does_so_among_sessions_too() -> None:
    command = [sys.executable, "-c", NICE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, start_new_session=True)
    nice, _group, *session = done.stdout.split()
    assert (nice, session) == ("19", ["nice", "19"])


@pytest.mark.skipif(not guest.AUTOGROUP.exists(), reason="this system doesn't group processes by session")
def test_who_steps_back_leaves_the_session_of_others_as_it_is() -> None:
    done = subprocess.run([sys.executable, "-c", NICE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["19", *guest.AUTOGROUP.read_text().split()]  # nothing where it is in no group
