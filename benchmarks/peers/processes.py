"""What servers cost, by Linux's /proc. Processes are known by a mark in their environment; only those are ended."""

import os
import signal
import subprocess
import time
from pathlib import Path

MARK = "BENCHMARK_MARK"  # no SAFELIGHT_ variable: the service refuses those that it doesn't know
PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def marked(mark: str) -> list[int]:
    """The processes that were started with this mark, by them or by their children, wherever they are now."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in PROC.iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:  # it has ended, or is somebody else's
                continue
    return found


def cpu_seconds(pids: list[int]) -> dict[int, float]:
    """User and system time of each process that is still there."""
    found = {}
    for pid in pids:
        try:
            fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found[pid] = (int(fields[11]) + int(fields[12])) / TICKS
    return found


def memory_mib(pids: list[int]) -> tuple[float, float]:
    """RSS and PSS over all processes: RSS counts a shared page once for each of them, PSS once."""
    total = {"Rss": 0, "Pss": 0}
    for pid in pids:
        try:
            lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            name, _, size = line.partition(":")
            if name in total:
                total[name] += int(size.split()[0])  # kB
    return total["Rss"] / 1024, total["Pss"] / 1024


def machine_seconds() -> float:
    """Processor time that all of the machine has spent, idling and waiting left out."""
    user, nice, system, _, _, interrupts, soft, stolen, *_ = map(
        int, (PROC / "stat").read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + interrupts + soft + stolen) / TICKS


def wait_until_quiet(cores: float, patience: float, ours: list[int]) -> float:
    """Wait until all but our processes use less than `cores`, or patience ends; return what they used last."""
    end = time.monotonic() + patience
    while True:
        begun, machine, own = time.monotonic(), machine_seconds(), sum(cpu_seconds(ours).values())
        time.sleep(0.5)
        spent = machine_seconds() - machine - (sum(cpu_seconds(ours).values()) - own)
        used = max(0.0, spent / (time.monotonic() - begun))
        if used < cores or time.monotonic() > end:
            return used


def end(process: subprocess.Popen[bytes], mark: str, patience: float = 12) -> None:
    """End a server and all that it started: asked first, then killed. Nothing without its mark is touched."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)  # it leads a group of its own
    until = time.monotonic() + patience
    while time.monotonic() < until:
        process.poll()
        if not marked(mark):
            break
        time.sleep(0.1)
    for pid in marked(mark):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # ended meanwhile
            continue
    process.wait(10)
