"""What this machine computes on, and in which numbers it is fast."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time

import torch

from mta.errors import ModelError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


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
            raise ModelError(f"dtype {dtype!r} cannot be used; expected auto, {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if gemm_rate(torch.bfloat16) > 1.2 * gemm_rate(torch.float32) else torch.float32


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free, instead of giving it back and being handed it anew page by page.

    Activations come and go with every pass. Done once for the whole process; elsewhere than on Linux nothing happens.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def gemm_rate(dtype: torch.dtype, size: int = 768) -> float:
    """Operations per second of a square matrix product on the CPU (best of five)."""
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
