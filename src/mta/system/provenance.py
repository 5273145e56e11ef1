"""Commit and package versions that produced a result."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from functools import cache
from pathlib import Path


@cache
def commit(*beside: Path) -> str:
    """Return the checked-out commit, with a "+" if the sources or the paths in ``beside`` were changed.

    Empty for an installed package.
    """
    try:
        if _git("ls-files", "--error-unmatch", "__init__.py"):
            changed = _git("status", "--porcelain", "--", ".", *map(str, beside))
            return _git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        pass
    return ""


def versions() -> dict[str, str]:
    """Return the versions of mta, torch, transformers and Python."""
    found = {name: version_of(name) or "unknown" for name in ("merge-then-adapt", "torch", "transformers")}
    return found | {"python": platform.python_version()}


def version_of(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str:
    folder = Path(__file__).parent.parent
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
