"""A lock on a folder: one process at a time writes a run, a bank, or a calibration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mta.errors import InputError
from mta.system.atomic import file_mode, make_folder


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created if missing. Raises InputError if another process holds it."""
    make_folder(folder)
    try:
        lock = FileLock(folder / ".lock", mode=file_mode()).acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another process is writing to {folder}", hint="Wait until it has ended, or choose another folder."
        ) from None
    with lock:
        yield
