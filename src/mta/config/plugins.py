"""Classes and functions of other packages, found by the entry points of a group, such as ``mta.methods``.

A package names them in its ``pyproject.toml``:

    [project.entry-points."mta.methods"]
    my-method = "my_package.methods:MyMethod"
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoints, entry_points
from typing import Any


@cache
def entries(group: str) -> EntryPoints:
    """Return the entry points of a group. They are read once: it takes 20 ms, and every check of settings asks."""
    return entry_points(group=group)


def names(group: str) -> list[str]:
    """Return the names of a group, in order."""
    return sorted(entries(group).names)


def load(group: str, name: str) -> Any:
    """Return the object with this name; None without one."""
    return next((entry.load() for entry in entries(group).select(name=name)), None)
