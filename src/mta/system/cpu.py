"""Processor information from Linux; empty on other systems."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def cpuinfo(*fields: str) -> str:
    """Return the value of the first line of /proc/cpuinfo whose field is one of ``fields``, or an empty string.

    >>> cpuinfo("flags", "Features")  # x86-64 and ARM64 name their instruction sets differently
    """
    listing = Path("/proc/cpuinfo")
    for line in listing.read_text(encoding="utf-8", errors="replace").splitlines() if listing.is_file() else ():
        field, _, value = line.partition(":")
        if field.strip() in fields:
            return value.strip()
    return ""
