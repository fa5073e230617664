"""How many threads this process's libraries use, and how their threads wait."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def environment() -> dict[str, str]:
    """Variables that OpenMP reads when a library brings it in, so they are set before torch is imported.

    As many threads as there are usable cores, and threads that sleep while they wait for the others. By default they
    spin: beside a busy neighbour, each waits for a thread that has no core, and keeps the core that it waits for.
    """
    return {"OMP_NUM_THREADS": str(usable_cores()), "OMP_WAIT_POLICY": "PASSIVE"}


def usable_cores(cgroups: Path = CGROUPS) -> int:
    """The cores that this process may run on, or fewer where its control group has a CPU quota, as containers do."""
    quota = _quota(cgroups)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota(cgroups: Path) -> float | None:
    """Cores that the control group may use at once, of version 2 or 1; None where that is not limited."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroups / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            return int(quota) / int(period)
    return None
