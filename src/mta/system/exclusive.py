"""A lock on a folder: one process at a time writes a run, a bank, or a calibration."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mta.errors import InputError
from mta.system.atomic import file_mode, make_folder

log = logging.getLogger("mta")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created if missing. Raises InputError if another process holds it.

    Where files cannot be locked, as on NFS without a lock daemon, nothing is held.
    """
    make_folder(folder)
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(folder / ".lock", mode=file_mode()).acquire(timeout=0))
        except Timeout:
            raise InputError(
                f"another process is writing to {folder}", hint="Wait until it has ended, or choose another folder."
            ) from None
        except OSError as error:
            if error.errno != errno.ENOLCK:
                raise
            log.warning("%s cannot be locked: start no second process that writes there", folder)
        yield
