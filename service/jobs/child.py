"""A training process: started in a session of its own, signalled, and found again by the next service if this one dies.

Its standard input stays open for as long as this service lives: when it ends, the process knows that it is alone, and
stops by itself.
"""

import asyncio
import fcntl
import json
import os
import signal
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

LOG = "log.txt"
IDENTITY = "child.json"  # process id and start time
LOCK = ".lock"  # a process holds it for as long as it works in the folder

PROC = Path("/proc")
CGROUPS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))  # version 2, 1
# Between two pieces of work its threads spin for some tens of milliseconds (GNU's OpenMP counts turns) before they
# sleep. With one of them asleep Linux takes that processor for the free one, and crowds the service's threads there.
SPINNING = {"GOMP_SPINCOUNT": "2000000"}
FIRST_TO_GO = "500"  # where memory runs out, the system ends this process before the service


class Child:
    def __init__(self, process: Process) -> None:
        self._process = process
        self._exit = asyncio.create_task(process.wait())

    @classmethod
    async def start(cls, command: Sequence[str], folder: Path) -> "Child":
        """Run a command whose output goes to the folder's log. Raises OSError."""
        with (folder / LOG).open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=log, stderr=log, env=SPINNING | os.environ, start_new_session=True
            )
        child = cls(process)
        try:
            (folder / IDENTITY).write_text(json.dumps({"pid": process.pid, "started": _start_time(process.pid)}))
        except OSError:  # a process that nobody could find again
            child.kill()
            await process.wait()
            raise
        with suppress(OSError):  # another system, or the process is over
            (PROC / str(process.pid) / "oom_score_adj").write_text(FIRST_TO_GO)
        return child

    async def exited(self, seconds: float) -> int | None:
        """Its exit code, negative for a signal; None where it still runs after so long."""
        await asyncio.wait([self._exit], timeout=seconds)
        return self._exit.result() if self._exit.done() else None

    def terminate(self) -> None:
        """Ask it to end at its next step."""
        self._signal(signal.SIGTERM)

    def hold(self) -> None:
        """Ask it to wait where it is."""
        self._signal(signal.SIGTSTP)

    def release(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if not self._exit.done():
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


async def end_leftover(folder: Path, grace_seconds: float) -> None:
    """Wait until the process that a dead service left behind in this folder is gone; after the grace, end it.

    It is ended only where /proc shows that the process of that id is still the one that was started here.
    """
    patience = time.monotonic() + grace_seconds
    while (pid := _pid(folder)) or _is_locked(folder):
        if time.monotonic() > patience:
            if pid is None:
                return  # whoever it is, the next process will say so
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        await asyncio.sleep(0.05)


def _pid(folder: Path) -> int | None:
    """The process that was started last in a folder, while it lives."""
    try:
        identity = json.loads((folder / IDENTITY).read_bytes())
        pid, started = identity["pid"], identity["started"]
    except (OSError, ValueError, KeyError):
        return None
    return pid if started is not None and _start_time(pid) == started else None


def _is_locked(folder: Path) -> bool:
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _start_time(pid: int) -> str | None:
    """When a living process was started, and on which boot of the machine; None where there is none, or no /proc."""
    try:
        # Behind the name, which may hold anything: state, parent, …; the 22nd of all is the start in clock ticks.
        state, *fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    except (OSError, ValueError):
        return None
    return None if state == "Z" else f"{boot} {fields[18]}"


def out_of_memory_kills() -> int:
    """How often the system has ended a process of this container for want of memory; 0 where it doesn't say."""
    for path in CGROUPS:
        with suppress(OSError, ValueError):
            return int(dict(line.split() for line in path.read_text().splitlines())["oom_kill"])
    return 0
