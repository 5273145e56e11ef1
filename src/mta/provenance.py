"""Where a published figure comes from: the code, the versions and the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path


def commit() -> str:
    """The commit that is checked out, with "+" behind it where sources were changed; empty for an installed package."""
    try:
        if _git("ls-files", "--error-unmatch", "__init__.py"):
            return _git("rev-parse", "--short=12", "HEAD") + "+" * bool(_git("status", "--porcelain", "--", "."))
    except (OSError, subprocess.CalledProcessError):
        pass
    return ""


def versions() -> dict[str, str]:
    """Of what computes."""
    found = {name: importlib.metadata.version(name) for name in ("merge-then-adapt", "torch", "transformers")}
    return found | {"python": platform.python_version()}


def machine() -> str:
    """Processor and cores, and the GPU where there is one."""
    import torch

    name, listing = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    for line in listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    said = f"{name}, {cores} cores"
    return f"{said}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else said


def _git(*words: str) -> str:
    folder = Path(__file__).parent
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
