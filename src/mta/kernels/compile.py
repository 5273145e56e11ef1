"""Compile the kernels to a shared library for this processor on first use; the library is cached beside the assets.

Compilation needs g++ 12 or newer on Linux and takes about ten seconds. Without it, or with ``MTA_KERNELS=off``, torch's
own operations compute the same results up to rounding, more slowly. ``MTA_KERNELS=off:rotate,adamw`` switches off
single families.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from mta.errors import ConfigError, StoreError
from mta.system.assets import cache_dir
from mta.system.atomic import replacing
from mta.system.device import cpuinfo

log = logging.getLogger("mta")

Family = Literal["norm", "rotate", "attention", "low_rank", "adamw", "adapted_rows", "linear", "onednn"]
FAMILIES: dict[Family, tuple[str, ...]] = {  # families that can be switched off, and their kernels
    "norm": ("rms_norm", "rms_norm_backward"),
    "rotate": ("rotate",),
    "attention": ("gather", "spread", "scatter", "softmax", "softmax_backward"),
    "low_rank": ("low_rank", "low_rank_backward"),
    "adamw": ("adamw",),
    "adapted_rows": ("adapted_rows",),
    "linear": (),  # replaces a base's linear layers by ``product``
    "onednn": (),  # oneDNN instead of MKL for float32 products
}
_NUMBERS = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16"}  # names in the sources
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
_FLAGS = "-std=c++20 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -fPIC"
_MACHINES = {"x86_64": "-mprefer-vector-width=512", "aarch64": ""}  # flags of each machine type
_SOURCES = [Path(__file__).with_name(name) for name in ("kernels.cpp", "low_rank.hpp", "numbers.hpp")]
_LEAST = 12  # version of g++ that has __builtin_shufflevector
_TIMEOUT = 300  # seconds for one run of the compiler

Kernels = dict[str, Callable[..., None]]


class _Library(NamedTuple):
    """The kernels of each family and dtype, or the reason why there are none."""

    tables: dict[tuple[Family, torch.dtype], Kernels]
    failure: str = ""


def kernels(family: Family, *tensors: Tensor) -> Kernels | None:
    """Return a family's kernels for tensors of one dtype; None if torch's operations must be used.

    ``linear`` and ``onednn`` have no kernels of their own: an empty dict means that they are switched on.
    """
    dtype = tensors[0].dtype
    for tensor in tensors:  # no generator: called at every layer of every token
        if tensor.dtype != dtype or not tensor.is_cpu:
            return None
    return _library().tables.get((family, dtype))


def call(family: Family, dtype: torch.dtype, name: str, tensors: Sequence[Tensor | None], *numbers: float) -> None:
    """Call a kernel with tensors, then numbers."""
    places = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    _library().tables[family, dtype][name](*places, *numbers)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the kernels' sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def obstacle() -> str:
    """Return why the kernels cannot be compiled here; "" if they can. Raises ConfigError."""
    compiler = shutil.which("g++")
    version = _version(compiler) if compiler and sys.platform == "linux" else 0  # macOS may ask to install a compiler
    reasons = {
        "MTA_KERNELS is off": switched_off() == frozenset(FAMILIES),
        "they are compiled only on Linux": sys.platform != "linux",
        f"they are for x86-64 and ARM64, this is {platform.machine()}": platform.machine() not in _MACHINES,
        "there is no g++": not compiler,
        f"g++ {version} is older than {_LEAST}": 0 < version < _LEAST,
        "torch loaded no OpenMP runtime": not _openmp(),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def failure() -> str:
    """Return why compiling or loading failed in this process, or ""; compiles first if necessary."""
    return _library().failure


def switched_off() -> frozenset[str]:
    """Return the families that ``MTA_KERNELS`` switches off. Raises ConfigError for an unknown value."""
    value = os.environ.get("MTA_KERNELS", "")
    word, _, names = value.partition(":")
    off = frozenset(names.split(",") if names else FAMILIES)
    if value and (word != "off" or not off <= FAMILIES.keys()):
        raise ConfigError(
            f"MTA_KERNELS is {value!r}; expected off, or off:NAME,NAME with names of {', '.join(FAMILIES)}",
            hint="Use all kernels:  unset MTA_KERNELS",
        )
    return off if value else frozenset()


@cache
def _library() -> _Library:
    if obstacle():
        return _Library({})
    try:
        library = ctypes.CDLL(str(_compiled(shutil.which("g++") or "", _openmp())))
    except (OSError, subprocess.SubprocessError, StoreError) as error:
        reason = _message(error)
        log.warning("compiled kernels are not used, and training is slower: %s (see mta doctor)", reason)
        return _Library({}, reason)
    tables, off = dict[tuple[Family, torch.dtype], Kernels](), switched_off()
    for dtype in _NUMBERS:
        table = _table(library, dtype)
        for family in FAMILIES.keys() - off:
            tables[family, dtype] = {name: table[name] for name in FAMILIES[family]}
    return _Library(tables)


class _Entry(ctypes.Structure):
    """A kernel in the library's table: name, types of the arguments (letters of _TYPES), and address."""

    _fields_ = [("name", ctypes.c_char_p), ("arguments", ctypes.c_char_p), ("address", ctypes.c_void_p)]


def _table(library: Any, dtype: torch.dtype) -> Kernels:
    """Return the kernels for a dtype from the library's own table of names and types."""
    name = f"table_{_NUMBERS[dtype]}"
    count = ctypes.c_int64.in_dll(library, f"{name}_size").value
    functions = dict[str, Callable[..., None]]()
    for entry in (_Entry * count).in_dll(library, name):
        types = [_TYPES[letter] for letter in entry.arguments.decode()]
        functions[entry.name.decode()] = ctypes.CFUNCTYPE(None, *types)(entry.address)
    return functions


def _flags() -> list[str]:
    return [*_FLAGS.split(), *_MACHINES[platform.machine()].split()]


def _compiled(compiler: str, openmp: str) -> Path:
    """Return the path of the compiled library; one process compiles, and the others wait.

    The name is a hash of sources, compiler, flags, processor, and OpenMP runtime.
    """
    processor = cpuinfo("vendor_id"), cpuinfo("flags", "Features")
    words = [_run(compiler, "--version"), *_flags(), *processor, openmp]
    parts = [*(path.read_bytes() for path in _SOURCES), *(word.encode() for word in words)]
    path = cache_dir() / "kernels" / f"{hashlib.sha256(b'/'.join(parts)).hexdigest()[:24]}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=2 * _TIMEOUT):
            if not path.is_file():
                with replacing(path, private=False) as temporary:
                    temporary.write(_compile(compiler, openmp))
    return path


def _compile(compiler: str, openmp: str) -> bytes:
    """Compile the sources for all dtypes at the same time, and link the objects; return the library."""
    with tempfile.TemporaryDirectory(prefix="mta-kernels-") as folder, ThreadPoolExecutor(len(_NUMBERS)) as pool:

        def compile_for(number: str) -> str:
            target = str(Path(folder, f"{number}.o"))
            _run(compiler, *_flags(), f"-DNUMBER={number}", "-c", str(_SOURCES[0]), "-o", target)
            return target

        objects = list(pool.map(compile_for, _NUMBERS.values()))
        # Linked with torch's OpenMP runtime: -fopenmp would add a second runtime with competing threads.
        linked = Path(folder, "kernels.so")
        _run(compiler, "-shared", *objects, openmp, "-o", str(linked))
        return linked.read_bytes()


def _run(*command: str) -> str:
    english = os.environ | {"LC_ALL": "C"}  # for ``_message``
    done = subprocess.run(
        command, env=english, capture_output=True, text=True, errors="replace", check=True, timeout=_TIMEOUT
    )
    return done.stdout


@cache
def _version(compiler: str) -> int:
    """Return the compiler's major version; 0 if it does not say."""
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        return int(_run(compiler, "-dumpversion").partition(".")[0])
    return 0


def _message(error: Exception) -> str:
    """Return the compiler's first error, or the message of another error, in one line."""
    if not isinstance(error, subprocess.CalledProcessError):
        return " ".join(str(error).split())
    lines = str(error.stderr).splitlines() or [f"g++ ended with status {error.returncode} and no message"]
    line = next((line for line in lines if "error:" in line), lines[0])
    return line.replace(f"{_SOURCES[0].parent}{os.sep}", "").strip()


def _openmp(maps: Path = Path("/proc/self/maps")) -> str:
    """Return the path of the OpenMP runtime that torch loaded into this process, or ""."""
    try:
        lines = maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    paths = [Path(fields[5]) for line in lines if len(fields := line.split(maxsplit=5)) == 6]
    libraries = [path for path in paths if re.fullmatch(r"lib(?:gomp|iomp5|omp)[-.\w]*\.so[.\w]*", path.name)]
    package = Path(torch.__file__).resolve().parent
    own = package / "lib", package.with_name("torch.libs")  # other packages bring runtimes of their own: scikit-learn
    libraries.sort(key=lambda path: path.parent not in own)
    return str(libraries[0]) if libraries else ""
