"""The kernels as a shared library: compiled for this processor on first use, kept beside the assets.

Compiling takes g++ 12 or newer on Linux and about ten seconds, once. Where that is not possible, or ``MTA_KERNELS`` is
``off``, torch's own operations compute the same results up to rounding, more slowly. ``MTA_KERNELS=off:rotate,adamw``
switches off single families.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from filelock import FileLock

from mta.errors import ConfigError
from mta.system.assets import cache_dir
from mta.system.atomic import written_aside
from mta.system.cpu import cpuinfo

log = logging.getLogger("mta")

Family = Literal[
    "norm", "rotate", "attention", "low_rank", "adamw", "adapted_rows", "linear", "onednn",
]  # fmt: skip
FAMILIES: dict[Family, tuple[str, ...]] = {  # what can be switched off alone, and the kernels each needs
    "norm": ("rms_norm", "rms_norm_backward"),
    "rotate": ("rotate",),
    "attention": ("gather", "spread", "scatter", "softmax", "softmax_backward"),
    "low_rank": ("low_rank", "low_rank_backward"),
    "adamw": ("adamw",),
    "adapted_rows": ("adapted_rows",),
    "linear": (),  # the exchange of a base's linear layers for ``products``
    "onednn": (),  # oneDNN instead of MKL for float32 products
}
_NUMBERS = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16"}  # dtypes as the sources name them
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
_FLAGS = "-std=c++20 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -fPIC"
_MACHINES = {"x86_64": "-mprefer-vector-width=512", "aarch64": ""}  # and the flags that g++ knows there alone
_SOURCES = [Path(__file__).with_name(name) for name in ("kernels.cpp", "low_rank.hpp", "numbers.hpp")]
_PATIENCE = 300  # seconds for one run of the compiler

Kernels = dict[str, Callable[..., None]]
_off: frozenset[str] = frozenset()


class _Library(NamedTuple):
    """The kernels of each family and dtype, or why there are none."""

    found: dict[tuple[Family, torch.dtype], Kernels]
    failure: str = ""


def kernels(family: Family, *tensors: torch.Tensor) -> Kernels | None:
    """The family's kernels for these tensors, which must share their dtype; None where torch's operations have to do.

    ``linear`` and ``onednn`` have no kernels of their own: an empty dict says that they are on.
    """
    dtype = tensors[0].dtype
    for tensor in tensors:  # no generator: this is asked at every layer of every token
        if tensor.dtype != dtype or not tensor.is_cpu:
            return None
    return None if family in _off else _library().found.get((family, dtype))


def compiled(family: Family, dtype: torch.dtype) -> Kernels:
    """The kernels of a family that ``kernels`` has returned before, as a backward pass needs them."""
    return _library().found[family, dtype]


@contextmanager
def without_kernels(*families: Family) -> Iterator[None]:
    """Within the block, torch's own operations compute what these families compute, or all: for comparisons."""
    global _off
    before = _off
    _off = before | frozenset(families or FAMILIES)
    try:
        yield
    finally:
        _off = before


def obstacle() -> str:
    """Why nothing is compiled here, for a reader; an empty string where compiling is tried. Raises ConfigError."""
    reasons = {
        "MTA_KERNELS is off": switched_off() == frozenset(FAMILIES),
        "they are compiled on Linux alone": sys.platform != "linux",
        f"they are for x86-64 and ARM64, this is {platform.machine()}": platform.machine() not in _MACHINES,
        "there is no g++": not shutil.which("g++"),
        "torch brought no OpenMP runtime": not _openmp(),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def failure() -> str:
    """Why compiling or loading failed in this process, for a reader; compiles first if nothing is compiled yet."""
    return _library().failure


def switched_off() -> frozenset[str]:
    """The families that ``MTA_KERNELS`` switches off. Raises ConfigError for words that mean nothing."""
    given = os.environ.get("MTA_KERNELS", "")
    word, _, names = given.partition(":")
    off = frozenset(names.split(",") if names else FAMILIES)
    if given and (word != "off" or not off <= FAMILIES.keys()):
        raise ConfigError(
            f"MTA_KERNELS is {given!r}; expected off, or off:NAME,NAME with names of {', '.join(FAMILIES)}",
            hint="Use all kernels:  unset MTA_KERNELS",
        )
    return off if given else frozenset()


@cache
def _library() -> _Library:
    if obstacle():
        return _Library({})
    try:
        library = ctypes.CDLL(str(_compiled(shutil.which("g++") or "", _openmp())))
    except (OSError, subprocess.SubprocessError) as error:
        why = _said(error)
        log.warning("compiled kernels are not used, torch computes more slowly: %s (mta doctor says more)", why)
        return _Library({}, why)
    found, off = dict[tuple[Family, torch.dtype], Kernels](), switched_off()
    for dtype in _NUMBERS:
        table = _table(library, dtype)
        for family in FAMILIES.keys() - off:
            found[family, dtype] = {name: table[name] for name in FAMILIES[family]}
    return _Library(found)


class _Entry(ctypes.Structure):
    """A kernel as the library describes it: its name, the types of its arguments (letters of _TYPES), its address."""

    _fields_ = [("name", ctypes.c_char_p), ("arguments", ctypes.c_char_p), ("address", ctypes.c_void_p)]


def _table(library: Any, dtype: torch.dtype) -> Kernels:
    """The kernels for a dtype, by the names and types that the library itself gives them."""
    name = f"table_{_NUMBERS[dtype]}"
    count = ctypes.c_int64.in_dll(library, f"{name}_size").value
    found = dict[str, Callable[..., None]]()
    for entry in (_Entry * count).in_dll(library, name):
        types = [_TYPES[letter] for letter in entry.arguments.decode()]
        found[entry.name.decode()] = ctypes.CFUNCTYPE(None, *types)(entry.address)
    return found


def _flags() -> list[str]:
    return [*_FLAGS.split(), *_MACHINES[platform.machine()].split()]


def _place(compiler: str, openmp: str) -> Path:
    """The library's file, named by all that went into it: source, compiler, flags, processor and OpenMP runtime."""
    processor = cpuinfo("vendor_id"), cpuinfo("flags", "Features")
    words = [_run(compiler, "--version"), *_flags(), *processor, openmp]
    parts = [*(path.read_bytes() for path in _SOURCES), *(word.encode() for word in words)]
    return cache_dir() / "kernels" / f"{hashlib.sha256(b'/'.join(parts)).hexdigest()[:24]}.so"


def _compiled(compiler: str, openmp: str) -> Path:
    """The library's file, compiled by the first of several processes that need it while the others wait."""
    path = _place(compiler, openmp)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=2 * _PATIENCE):
            if not path.is_file():
                with written_aside(path, private=False) as aside:
                    aside.write(_compile(compiler, openmp))
    return path


def _compile(compiler: str, openmp: str) -> bytes:
    """The library: the sources compiled once for each dtype, all at the same time, and their objects linked."""
    with tempfile.TemporaryDirectory(prefix="mta-kernels-") as folder, ThreadPoolExecutor(len(_NUMBERS)) as pool:

        def compile_for(number: str) -> str:
            thing = str(Path(folder, f"{number}.o"))
            _run(compiler, *_flags(), f"-DNUMBER={number}", "-c", str(_SOURCES[0]), "-o", thing)
            return thing

        objects = list(pool.map(compile_for, _NUMBERS.values()))
        # Linked by hand: -fopenmp would bring a second runtime, whose threads fight with torch's.
        linked = Path(folder, "kernels.so")
        _run(compiler, "-shared", *objects, openmp, "-o", str(linked))
        return linked.read_bytes()


def _run(*command: str) -> str:
    plain = os.environ | {"LC_ALL": "C"}  # errors in English, for ``_said``
    done = subprocess.run(
        command, env=plain, capture_output=True, text=True, errors="replace", check=True, timeout=_PATIENCE
    )
    return done.stdout


def _said(error: Exception) -> str:
    """The first error of a compiler, or what another error says, in one line."""
    if not isinstance(error, subprocess.CalledProcessError):
        return " ".join(str(error).split())
    lines = str(error.stderr).splitlines() or [f"g++ ended with status {error.returncode} and said nothing"]
    line = next((line for line in lines if "error:" in line), lines[0])
    return line.replace(f"{_SOURCES[0].parent}{os.sep}", "").strip()


def _openmp() -> str:
    """The OpenMP runtime that torch brought into this process, or nothing."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"/\S*/lib(?:gomp|iomp5|omp)[-.\w]*\.so[.\w]*", maps)
    return found[0] if found else ""
