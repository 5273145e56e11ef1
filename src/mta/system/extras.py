"""Optional packages: the extra of the distribution that installs each, and the error if a package is missing."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType

from mta.errors import MissingExtra

EXTRAS: Mapping[str, tuple[str, ...]] = MappingProxyType(  # extra -> its packages, as in pyproject.toml
    {
        "assets": ("accelerate", "gguf"),
        "eval": ("matplotlib", "rouge-score"),
        "lab": ("bm25s", "cma", "matplotlib", "rouge-score"),
        "serve": ("fastapi", "httpx2", "prometheus-client", "uvicorn"),
        "tables": ("pyarrow",),
        "ray": ("ray",),
        "quantize": ("accelerate", "bitsandbytes"),
    }
)

_TO_INSTALL = {"ray": "'ray[client]'"}  # for ray:// addresses


def require(extra: str, *packages: str) -> None:
    """Check that ``packages`` can be imported, or without names all packages of the extra. Raises MissingExtra."""
    for package in packages or EXTRAS[extra]:
        if find_spec(package.replace("-", "_")) is None:
            raise MissingExtra(f"{package} is not installed; it belongs to the extra {extra!r}", hint=install(extra))


def install(extra: str) -> str:
    """Return the command that installs the packages of an extra, wherever mta itself was installed from."""
    return f"pip install {' '.join(_TO_INSTALL.get(name, name) for name in EXTRAS[extra])}"
