"""How many processors are ours. Needs no torch, so that commands that don't either start fast."""

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def processors(cgroup: Path = CGROUP) -> int:
    """Processors that this process may use: its affinity, and its container's CPU quota, whichever is less."""
    allowed, quota = allowed_processors(), _cgroup_quota(cgroup)
    return max(1, min(allowed, math.ceil(quota))) if quota else allowed


def allowed_processors() -> int:
    """Processors that this process may run on, if not all the time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cgroup_quota(cgroup: Path) -> float | None:
    """CPUs' worth of time that the container may use, from cgroup v2 or v1; None where there is no limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
