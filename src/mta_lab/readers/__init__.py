"""Readers of the formats of LaMP, Per-Pcs, and RecBole. `pyproject.toml` names them in the group ``mta.readers``."""

from __future__ import annotations

from pathlib import Path

from mta.errors import DataError


def only_file(folder: Path, pattern: str, hint: str) -> Path:
    """Return the file of a folder that matches ``pattern``. Raises DataError if there are several or none."""
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise DataError(f"{folder}: expected one file {pattern}, got {names}", hint=hint)
    return files[0]
