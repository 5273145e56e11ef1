"""Commit and package versions that produced a result."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
import subprocess
from functools import cache
from pathlib import Path

from mta.system.atomic import file_sha256

_PACKAGE = Path(__file__).parent.parent


@cache
def commit(*beside: Path) -> str:
    """Return the checked-out commit, with a "+" if the sources or the paths in ``beside`` were changed.

    Empty for an installed package.
    """
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if _git("ls-files", "--error-unmatch", "__init__.py"):
            changed = _git("status", "--porcelain", "--", ".", *map(str, beside))
            return _git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)
    return ""


def versions() -> dict[str, str]:
    """Return the versions of mta, torch, transformers and Python."""
    packages = {name: version_of(name) or "unknown" for name in ("merge-then-adapt", "torch", "transformers")}
    return packages | {"python": platform.python_version()}


def version_of(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def sources_digest() -> str:
    """Return the sha256 of this package's Python files, by their relative paths and contents."""
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(_PACKAGE).as_posix(), path) for path in _PACKAGE.rglob("*.py")):
        digest.update(f"{name}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=_PACKAGE, capture_output=True, text=True, check=True).stdout.strip()
