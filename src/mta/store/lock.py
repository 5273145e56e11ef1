"""A lock for files of a local store that are read, changed, and written again.

    .lock        an empty file in the store's folder; its name reveals no person

Other storage has no such lock: of two simultaneous changes of one file, only the later may be kept.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from mta.errors import StoreError
from mta.system.atomic import file_mode, owner_only
from mta.system.storage import Storage

LOCK = ".lock"
_NO_LOCKS = "This file system cannot lock files. Put the store on a local disk."
_WAIT = 60.0  # seconds: each holder reads and writes one small file


@contextlib.contextmanager
def locked(files: Storage) -> Iterator[None]:
    """Hold the lock of a local store within the block; do nothing if there is no store yet. The lock does not nest.

    Raises StoreError.
    """
    if not files.local or not Path(files.root).is_dir():
        yield
        return
    path = Path(files.at(LOCK))
    try:
        open(path, "ab", opener=owner_only).close()
        held = FileLock(path, timeout=_WAIT, mode=file_mode())
        held.acquire()
    except OSError as error:  # includes filelock's Timeout
        hint = "Check the store's permissions and free space, and that no stopped process holds the lock."
        if error.errno == errno.ENOLCK:  # NFS without a lock daemon
            hint = _NO_LOCKS
        raise StoreError(f"{path} cannot be locked: {error.strerror or error}", hint) from error
    try:
        yield
    finally:
        held.release()
