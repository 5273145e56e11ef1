"""What this machine computes on, and in which numbers it is fast."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from filelock import FileLock

from mta.errors import ModelError
from mta.system.assets import cache_dir
from mta.system.atomic import read_json, write_json
from mta.system.cpu import cpuinfo

T = TypeVar("T")
_SETTING = threading.Lock()  # of the number of threads: two at once would take each other's for the one from before
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def processor() -> str:
    """The processor's name as it gives it, and the GPU's where there is one."""
    name = cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_device(device: str) -> torch.device:
    """'auto' takes the GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {device!r} cannot be used: {str(error).splitlines()[0]}", hint="Use --device cpu."
        ) from None


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """'auto' takes bfloat16 where this machine multiplies it faster than float32 (measured in milliseconds)."""
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ModelError(
                f"dtype {dtype!r} cannot be used; expected auto, {', '.join(_DTYPES)}",
                hint="Leave it to the machine:  dtype=auto",
            )
        return _DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16
    return _DTYPES[_faster()]


def faster(bfloat16: float, float32: float) -> str:
    """Which of the two to compute in, by their rates: bfloat16 has to be worth its rounding."""
    return "bfloat16" if bfloat16 > 1.2 * float32 else "float32"


def _faster() -> str:
    """The faster dtype, measured once for each processor and torch, and saved in the cache folder.

    A busy moment must not make another base of the same weights. The first of several processes that start together
    measures, and the others wait for its choice.
    """
    note = cache_dir() / "dtype.json"
    if known := _noted(note).get(_here()):
        return known
    with contextlib.suppress(OSError):  # a cache folder that cannot be written to
        note.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(note.with_suffix(".lock")):
            if known := _noted(note).get(_here()):
                return known
            found = _measured()
            write_json(note, _noted(note) | {_here(): found}, private=False)
            return found
    return _measured()


def _measured() -> str:
    return faster(gemm_rate(torch.bfloat16), gemm_rate(torch.float32))


def _noted(note: Path) -> dict[str, str]:
    """The choices saved in a note, by processor and torch."""
    found = read_json(note)
    return {key: value for key, value in found.items() if value in _DTYPES} if isinstance(found, dict) else {}


def _here() -> str:
    """The key of a choice: processor and torch version."""
    # Virtual machines give different processors one name; their instruction sets tell them apart.
    features = hashlib.sha256(cpuinfo("flags", "Features").encode()).hexdigest()[:8]
    return f"{processor()} ({features}), torch {torch.__version__}"


def in_passing(work: Callable[[], T]) -> T:
    """What ``work`` returns, computed in a thread that ends with it.

    OpenMP keeps helpers for every thread that ever computed. When they are more than the cores, GNU's runtime lets none
    of them wait actively, and a pass of few tokens takes 1.7 times as long. So whoever loads what another thread will
    compute with should leave no helpers behind.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def compute_with(threads: int) -> None:
    """Set how many threads torch uses for work of this thread, which must be a new one.

    ``torch.set_num_threads`` gives its number to every thread that begins later too: they get the one from before.
    """
    with _SETTING:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        in_passing(lambda: torch.set_num_threads(before))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of ``device`` for the block, and restore their states after it.

    For functions that take no generator. Other threads that draw from the same generators meanwhile are not kept apart.
    """
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all GPUs as well
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def gemm_rate(dtype: torch.dtype, size: int = 768) -> float:
    """Operations per second of a square matrix product on the CPU (best of twenty)."""
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
