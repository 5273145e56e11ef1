"""What this process takes of the machine: its cores, and how glibc's malloc treats freed memory.

Does not import torch. ``mta`` limits the threads and changes malloc; the library changes malloc on request only, and
only on Linux with glibc.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

_CGROUP = Path("/sys/fs/cgroup")
_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))  # of cgroups v2 and v1
_HUGE = 2 << 20  # bytes of a huge page
_POINTER = ctypes.c_void_p
_TRIM_THRESHOLD, _MMAP_MAX, _MADV_HUGEPAGE = -1, -4, 14  # from malloc.h and mman.h

_keeps = False  # keep_freed_memory was called in this process


def cores() -> int:
    """Return the number of cores that this process may use: by its affinity, and by the quota of its container."""
    return min(_affinity(), _quota() or _affinity())


def limit_threads() -> None:
    """Limit the threads of torch to ``cores``, unless OMP_NUM_THREADS is set. Call this before torch is imported.

    OpenMP counts the cores of the affinity only: on a quota of 4 of 64 cores, 64 threads would take turns.
    """
    if cores() < _affinity():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))


def is_out_of_memory(error: Exception) -> bool:
    """Return whether Python, a GPU, or torch's allocator on the CPU found no memory."""
    return type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in str(error)


class OtherProcesses:
    """Measure how many of this process's cores other processes use. Known on Linux, outside containers with a quota."""

    def __init__(self) -> None:
        self._last = self._seconds()

    def cores(self) -> float:
        """Return the mean number of cores that others used since the last call; 0 where it is not known.

        Workers of Ray are other processes, too: with them, nothing is known.
        """
        before, self._last = self._last, self._seconds()
        passed, busy, own = (now - then for now, then in zip(self._last, before))
        known = passed > 1 and cores() == _affinity() and "ray" not in sys.modules
        return max(busy - own, 0.0) / passed if known else 0.0

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        """Return the time, the seconds that this process's cores were busy, and those of this process."""
        busy = 0.0
        with contextlib.suppress(OSError, ValueError, AttributeError):
            mine, ticks = {f"cpu{n}" for n in os.sched_getaffinity(0)}, os.sysconf("SC_CLK_TCK")
            for name, *spent in map(str.split, Path("/proc/stat").read_text(encoding="ascii").splitlines()):
                if name in mine:
                    user, nice, system, _, _, irq, soft = map(int, spent[:7])
                    busy += (user + nice + system + irq + soft) / ticks
        return time.monotonic(), busy, sum(os.times()[:4])  # with children that ended


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota() -> int | None:
    """Return the CPU quota of this process's cgroup in cores, rounded up; None if there is none."""
    for names in _QUOTAS:
        with contextlib.suppress(OSError, ValueError):  # another version, or "max"
            quota, period = (int(word) for name in names for word in (_CGROUP / name).read_text().split())
            if quota > 0 and period > 0:  # -1: no quota
                return -(-quota // period)
    return None


def keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors free, in huge pages. The setting holds for the whole process.

    Activations are freed after every pass. By default glibc returns them to the system, and a training step spends a
    tenth of its time on page faults. The command line and its workers call this function. A program that uses the
    library keeps its own malloc settings, unless it calls this function before it loads a base.
    """
    global _keeps
    if _keeps:
        return
    with contextlib.suppress(OSError, AttributeError, ValueError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_TRIM_THRESHOLD, -1)  # nothing is given back
        libc.mallopt(_MMAP_MAX, 0)  # large tensors come from the heap as well
        _reserve_in_huge_pages(libc)
        _keeps = True


def give_back_memory(keep: int) -> None:
    """Return free memory to the system if more than ``keep`` bytes of it are held.

    Does nothing unless ``keep_freed_memory`` was called in this process.
    The trainer calls this after a cohort: the next cohort reuses most of the memory. Its sizes do not fit exactly into
    what was freed, so without this call every cohort would peak a little higher.
    """
    if not _keeps:
        return
    with contextlib.suppress(OSError, AttributeError, ValueError, KeyError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallinfo2.restype = _Mallinfo
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        resident = dict(line.split(":", 1) for line in status)["RssAnon"]  # in kB, without files
        if (int(resident.split()[0]) << 10) - libc.mallinfo2().used > keep:
            libc.malloc_trim(0)
            _reserve_in_huge_pages(libc)


class _Mallinfo(ctypes.Structure):
    """Result of glibc's mallinfo2: ten sizes; the eighth is the bytes in use."""

    _fields_ = [("before", ctypes.c_size_t * 7), ("used", ctypes.c_size_t), ("after", ctypes.c_size_t * 2)]


def _reserve_in_huge_pages(libc: Any) -> None:
    """Reserve half of the machine's memory as heap addresses in huge pages. Untouched pages take no memory."""
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = _POINTER, [ctypes.c_size_t], [_POINTER]
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if heap := libc.malloc(size):
        libc.free(heap)
        start = -(-heap // _HUGE) * _HUGE
        libc.madvise.argtypes = [_POINTER, ctypes.c_size_t, ctypes.c_int]
        libc.madvise(start, (heap + size - start) // _HUGE * _HUGE, _MADV_HUGEPAGE)
