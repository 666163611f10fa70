"""How much memory is ours. Needs no torch."""

import os
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # cgroup version 2, 1


def memory(cgroup: Path = CGROUP) -> int:
    """Bytes that there are: the machine's, or what its container may take, if that is less."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in LIMITS:
        with suppress(OSError, ValueError):  # not there, or "max"
            found.append(int((cgroup / name).read_text()))
    return min(found)
