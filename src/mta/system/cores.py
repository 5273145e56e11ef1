"""How many cores this process may use. Does not import torch."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))  # of cgroups v2 and v1


def cores() -> int:
    """Return the number of cores that this process may use: by its affinity, and by the quota of its container."""
    return min(_affinity(), _quota() or _affinity())


def limit_threads() -> None:
    """Limit the threads of torch to ``cores``, unless OMP_NUM_THREADS is set. Call this before torch is imported.

    OpenMP counts the cores of the affinity only: on a quota of 4 of 64 cores, 64 threads would take turns.
    """
    if cores() < _affinity():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota() -> int | None:
    """Return the CPU quota of this process's cgroup in cores, rounded up; None if there is none."""
    for names in _QUOTAS:
        with suppress(OSError, ValueError):  # another version, or "max"
            quota, period = (int(word) for name in names for word in (_CGROUP / name).read_text().split())
            if quota > 0 and period > 0:  # -1: no quota
                return -(-quota // period)
    return None
