"""One writer at a time for the files of a local store that are read, changed, and written again.

    .lock        an empty file in the store's folder; its name reveals no person

Storage that is not local has no such lock: of two changes of one file at one instant the later alone may stay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from mta.errors import StoreError
from mta.system.atomic import owner_only
from mta.system.storage import Storage

LOCK = ".lock"
_WAIT = 60.0  # seconds: each holder reads and writes one small file


@contextlib.contextmanager
def locked(files: Storage) -> Iterator[None]:
    """Hold the lock of a local store within the block; nothing where there is no store yet. It does not nest.

    Raises StoreError.
    """
    if not files.local or not Path(files.root).is_dir():
        yield
        return
    path = Path(files.at(LOCK))
    try:
        open(path, "ab", opener=owner_only).close()
        held = FileLock(path, timeout=_WAIT)
        held.acquire()
    except OSError as error:  # a lock that is not given in time is one too
        raise StoreError(
            f"{path} cannot be locked: {error.strerror or error}",
            hint="Check the store's permissions and free space, and that no stopped process holds it; then repeat.",
        ) from error
    try:
        yield
    finally:
        held.release()
