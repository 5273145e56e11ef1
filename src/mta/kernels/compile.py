"""The kernels as a shared library: compiled for this processor on first use, kept beside the assets.

A C++ compiler (g++) on Linux is all it takes, and about two seconds, once. Where there is none, or ``MTA_KERNELS`` is
``off``, everything is computed with torch's own operations: the same results up to rounding, more slowly.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mta.aside import written_aside
from mta.assets import cache_dir

SIGNATURES = {  # p: a pointer, i: an integer, d: a double; in the order of the library's tables
    "rms_norm": "pppp iid",
    "rms_norm_backward": "ppppp ii",
    "swiglu": "ppp i",
    "swiglu_backward": "ppppp i",
    "rotate": "pppp iiiiii",
    "gather": "ppp iiii",
    "spread": "ppp iiiii",
    "scatter": "pppp iiii",
    "softmax": "pp iiiid",
    "softmax_backward": "pp iid",
    "log_sum_exp": "pp ii",
    "weighted_softmax": "pppp ii",
    "low_rank": "ppppp iiiii",
    "low_rank_backward": "ppppppppp iiiiii",
    "few_rows": "pppp iii",
    "side_by_side": "pppp iiii",
    "adamw": "pppppppp iiddd",
    "adapted_rows": "ppppppppppp iiiii",
}
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
_FLAGS = "-std=c++20 -O3 -march=native -mprefer-vector-width=512 -fno-math-errno -fno-trapping-math -fopenmp -fPIC"
_SOURCES = [Path(__file__).with_name(name) for name in ("kernels.cpp", "low_rank.hpp", "numbers.hpp")]

Kernels = dict[str, Callable[..., None]]
_off = 0


def kernels(*tensors: torch.Tensor) -> Kernels | None:
    """The kernels for these tensors, which must share their dtype; None where torch's operations have to do."""
    dtype = tensors[0].dtype
    for tensor in tensors:  # no generator: this is asked at every layer of every token
        if tensor.dtype != dtype or not tensor.is_cpu:
            return None
    return None if _off else _library().get(dtype)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within the block, everything is computed with torch's own operations: for comparisons."""
    global _off
    _off += 1
    try:
        yield
    finally:
        _off -= 1


def obstacle() -> str:
    """Why no kernels are compiled here, for a reader; nothing where they can be."""
    reasons = {
        "MTA_KERNELS is off": os.environ.get("MTA_KERNELS") == "off",
        "they are compiled on Linux alone": sys.platform != "linux",
        "there is no g++": not shutil.which("g++"),
        "torch brought no OpenMP runtime": not _openmp(),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


@cache
def _library() -> dict[torch.dtype, Kernels]:
    if obstacle():
        return {}
    try:
        library = ctypes.CDLL(str(_compiled(shutil.which("g++") or "", _openmp())))
    except (OSError, subprocess.SubprocessError):
        return {}
    return {dtype: _table(library, str(dtype)) for dtype in (torch.float32, torch.float64, torch.bfloat16)}


def _table(library: Any, dtype: str) -> Kernels:
    name = f"table_{dtype.removeprefix('torch.')}"
    addresses = (ctypes.c_void_p * len(SIGNATURES)).in_dll(library, name)
    kinds = [[_TYPES[letter] for letter in letters.replace(" ", "")] for letters in SIGNATURES.values()]
    return {
        kernel: ctypes.CFUNCTYPE(None, *types)(address)
        for kernel, types, address in zip(SIGNATURES, kinds, addresses, strict=True)
    }


def is_compiled() -> bool:
    """Whether the library is there already: to ask takes no seconds."""
    return not obstacle() and _place(shutil.which("g++") or "", _openmp()).is_file()


def _place(compiler: str, openmp: str) -> Path:
    """The library's file, named by all that went into it: source, compiler, flags, processor and OpenMP runtime."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    processor = re.search(rb"^flags.*$", Path("/proc/cpuinfo").read_bytes(), re.MULTILINE)
    parts = [
        *(path.read_bytes() for path in _SOURCES),
        version,
        _FLAGS.encode(),
        processor[0] if processor else b"",
        openmp.encode(),
    ]
    return cache_dir() / "kernels" / f"{hashlib.sha256(b'/'.join(parts)).hexdigest()[:24]}.so"


def _compiled(compiler: str, openmp: str) -> Path:
    path = _place(compiler, openmp)
    if not path.is_file():
        with written_aside(path) as aside:
            thing = aside.with_suffix(".o")
            try:
                _run(compiler, *_FLAGS.split(), "-c", str(_SOURCES[0]), "-o", str(thing))
                # Linked by hand: -fopenmp would bring a second runtime, whose threads fight with torch's.
                _run(compiler, "-shared", str(thing), openmp, "-o", str(aside))
            finally:
                thing.unlink(missing_ok=True)
    return path


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=True, timeout=300)


def _openmp() -> str:
    """The OpenMP runtime that torch brought into this process, or nothing."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"/\S*/lib(?:gomp|iomp5|omp)[-.\w]*\.so[.\w]*", maps)
    return found[0] if found else ""
