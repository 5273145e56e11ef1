"""Devices, dtypes, threads and random seeds of this machine."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mta.errors import ModelError

T = TypeVar("T")
_SETTING = threading.Lock()  # guards the number of threads, which compute_with reads, sets and restores
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # instruction sets of x86-64 and ARM64
REACHED = 0.6  # of ``gemm_rate`` in passes over people: make bench, row "operations against torch.mm"
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


def cpu() -> str:
    """Return the CPU's name."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


def processor() -> str:
    """Return the CPU's name, followed by the GPU's name if there is a GPU."""
    return f"{cpu()}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else cpu()


def pick_device(device: str) -> torch.device:
    """Return the torch device; 'auto' is the GPU if there is one. Raises ModelError.

    A named GPU becomes the current one of this thread: what asks for no device would use the first GPU.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.zeros(0, device=device).device
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        return chosen
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {device!r} cannot be used: {str(error).splitlines()[0]}",
            hint="Use --device cpu, or install torch for your GPU: https://pytorch.org/get-started (see mta doctor)",
        ) from None


def moved(device: torch.device, *parts: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of one dtype on ``device``, unchanged if they are there.

    A GPU gets all of them by one copy from pinned memory, for which this thread does not wait: ``tensor.to(device)``
    would wait until the GPU has done all its work so far.
    """
    if all(part.device == device for part in parts):
        return parts
    flat = torch.cat([part.flatten() for part in parts])
    if device.type == "cuda":
        flat = flat.pin_memory()
    flat = flat.to(device, non_blocking=device.type == "cuda")
    pieces = torch.split(flat, [part.numel() for part in parts])
    return tuple(piece.view(part.shape) for piece, part in zip(pieces, parts))


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype; 'auto' is bfloat16 if the device has instructions for it, else float32. Raises ModelError."""
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ModelError(
                f"dtype {dtype!r} cannot be used; expected auto, {', '.join(_DTYPES)}",
                hint="Leave it to the machine:  dtype=auto",
            )
        return _DTYPES[dtype]
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as in settings: float32."""
    return str(dtype).removeprefix("torch.")


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ModelError for weights in a dtype that is not trained over: gradients in float16 need scaled losses."""
    if dtype not in _DTYPES.values():
        raise ModelError(
            f"the model's weights are {dtype}; expected one of: {', '.join(_DTYPES)}",
            hint="Load them in one of these:  AutoModelForCausalLM.from_pretrained(…, dtype=torch.bfloat16)",
        )


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16 products: without them, bfloat16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not _BFLOAT16.isdisjoint(cpuinfo("flags", "Features").split())


def run_in_short_thread(work: Callable[[], T]) -> T:
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
        run_in_short_thread(lambda: torch.set_num_threads(before))


def clock(device: torch.device) -> float:
    """Return the time in seconds after all work that was given to a device: a GPU computes while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def gemm_rate(dtype: torch.dtype, size: int = 768) -> float:
    """Return operations per second of a square matrix product on the CPU (best of twenty)."""
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
