"""Classes and functions of other packages, found by the entry points of a group, such as ``mta.methods``.

A package names them in its ``pyproject.toml``:

    [project.entry-points."mta.methods"]
    my-method = "my_package.methods:MyMethod"
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any


def names(group: str) -> list[str]:
    """Return the names of a group, in order."""
    return sorted(entry_points(group=group).names)


@cache
def load(group: str, name: str) -> Any:
    """Return the object with this name; None without one."""
    return next((entry.load() for entry in entry_points(group=group, name=name)), None)
