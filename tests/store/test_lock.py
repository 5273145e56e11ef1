"""The lock of a local store, on file systems that have no locks."""

import errno
from pathlib import Path

import pytest

from mta.errors import StoreError
from mta.store import lock
from mta.system.storage import Storage


@pytest.mark.parametrize(
    ("code", "hint"),
    [(errno.ENOLCK, "This file system cannot lock files. Put the store on a local disk."), (errno.EIO, "Check the ")],
)
def test_a_store_that_cannot_be_locked_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, hint: str
) -> None:
    def refuse(_: lock.FileLock) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(lock.FileLock, "acquire", refuse)
    with pytest.raises(StoreError, match="cannot be locked: no") as caught, lock.locked(Storage(tmp_path)):
        pytest.fail("entered without the lock")
    assert caught.value.hint.startswith(hint)
