"""Devices, dtypes, threads and random seeds of this machine."""

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
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from filelock import FileLock

from mta.errors import ModelError
from mta.system.assets import cache_dir
from mta.system.atomic import read_json, write_json

T = TypeVar("T")
_SETTING = threading.Lock()  # guards the number of threads, which compute_with reads, sets and restores
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@cache
def cpuinfo(*fields: str) -> str:
    """Return the value of the first line of /proc/cpuinfo whose field is one of ``fields``, or an empty string.

    >>> cpuinfo("flags", "Features")  # x86-64 and ARM64 name their instruction sets differently
    """
    listing = Path("/proc/cpuinfo")
    for line in listing.read_text(encoding="utf-8", errors="replace").splitlines() if listing.is_file() else ():
        field, _, value = line.partition(":")
        if field.strip() in fields:
            return value.strip()
    return ""


def processor() -> str:
    """Return the processor's name, followed by the GPU's name if there is a GPU."""
    name = cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_device(device: str) -> torch.device:
    """Return the torch device; 'auto' is the GPU if there is one. Raises ModelError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {device!r} cannot be used: {str(error).splitlines()[0]}", hint="Use --device cpu."
        ) from None


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype; 'auto' is bfloat16 if it is faster than float32 on this machine. Raises ModelError."""
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
    """Return the dtype to compute in, from both rates. bfloat16 must be 1.2 times faster to outweigh its rounding."""
    return "bfloat16" if bfloat16 > 1.2 * float32 else "float32"


def _faster() -> str:
    """Return the faster dtype, measured once per processor and torch version, and saved in the cache folder.

    The choice is saved because a measurement on a busy machine must not change the dtype of a base. If several
    processes start together, the first one measures and the others wait.
    """
    note = cache_dir() / "dtype.json"
    if known := _saved_choices(note).get(_machine_key()):
        return known
    with contextlib.suppress(OSError):  # a cache folder that cannot be written to
        note.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(note.with_suffix(".lock")):
            if known := _saved_choices(note).get(_machine_key()):
                return known
            found = _measured()
            write_json(note, _saved_choices(note) | {_machine_key(): found}, private=False)
            return found
    return _measured()


def _measured() -> str:
    return faster(gemm_rate(torch.bfloat16), gemm_rate(torch.float32))


def _saved_choices(note: Path) -> dict[str, str]:
    """Return the saved dtypes by machine key."""
    found = read_json(note)
    return {key: value for key, value in found.items() if value in _DTYPES} if isinstance(found, dict) else {}


def _machine_key() -> str:
    """Return the key of a saved dtype: processor and torch version."""
    # Virtual machines report the same name for different processors, but different instruction sets.
    features = hashlib.sha256(cpuinfo("flags", "Features").encode()).hexdigest()[:8]
    return f"{processor()} ({features}), torch {torch.__version__}"


def in_passing(work: Callable[[], T]) -> T:
    """Return the result of ``work``, computed in a thread that ends with it.

    OpenMP keeps helper threads for every thread that has computed. If there are more helpers than cores, GNU's runtime
    lets no helper wait actively, and a pass of few tokens takes 1.7 times as long. So load models in a thread that
    ends, if another thread will compute with them.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def compute_with(threads: int) -> None:
    """Set the number of torch threads for this thread only. Call this in a new thread.

    ``torch.set_num_threads`` also sets the number for threads that start later, so it is restored for them.
    """
    with _SETTING:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        in_passing(lambda: torch.set_num_threads(before))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of ``device`` for the block, and restore their states after it.

    For functions that take no generator. Not isolated from other threads that draw from the same generators.
    """
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all GPUs as well
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def gemm_rate(dtype: torch.dtype, size: int = 768) -> float:
    """Return operations per second of a square matrix product on the CPU (best of twenty)."""
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
