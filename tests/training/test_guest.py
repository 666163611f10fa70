"""A process that stays out of the way: tried on processes of their own."""

import subprocess
import sys

import pytest

HELLO = "print('ready', flush=True); "


@pytest.mark.skipif(sys.platform != "linux", reason="what a process may allocate is limited on Linux")
def test_more_memory_than_allowed_is_an_error_and_not_a_swap() -> None:
    program = "from training import guest; guest.limit_memory(2**28); bytearray(2**29)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "MemoryError"


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
