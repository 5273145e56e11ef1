"""Files under a folder or an fsspec URL: atomic writes, and exclusive creation."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from mta.errors import StoreError
from mta.system.atomic import SHARED, file_mode, is_shared, owner_only, replacing, sync_folder

T = TypeVar("T")
R = TypeVar("R")
_TOGETHER = 16  # requests at once, because remote storage answers slowly
_WAIT = 60.0  # seconds for the lock: each holder reads and writes one small file
LOCK = ".lock"  # an empty file in the root of local storage


def in_threads(work: Callable[[T], R], values: Sequence[T]) -> Iterator[R]:
    """Yield the result of ``work`` for each value, in order, computed in threads: for work that waits for storage."""
    with ThreadPoolExecutor(_TOGETHER, "mta-storage") as pool:
        for start in range(0, len(values), 16 * _TOGETHER):
            yield from pool.map(work, values[start : start + 16 * _TOGETHER])


class Storage:
    """File operations of a store, by names relative to its root. Failures become StoreError."""

    def __init__(self, url: str | Path) -> None:
        if not str(url).strip():
            raise StoreError("the store's address is empty", hint="Name a folder, or a URL:  --store people/")
        if "::" in str(url) and "://" not in str(url):  # fsspec would read it as a chain of file systems
            raise StoreError(f"the folder {str(url)!r} has '::' in its name", hint="Rename the folder.")
        try:
            try:  # without a cache of listings: other processes write too
                self.fs, root = url_to_fs(str(url), use_listings_cache=False)
            except TypeError:  # it has no such cache, and passes all settings on to its server (sftp)
                self.fs, root = url_to_fs(str(url))
        except Exception as error:  # some file systems connect at once, with errors of their own
            hint = "Check address, login, and network."
            if isinstance(error, ImportError | ValueError):  # fsspec names the package
                hint = "Give a folder, or a URL that fsspec knows (s3://bucket/people), and install its package."
            raise StoreError(f"the store cannot be opened: {str(error) or type(error).__name__}", hint=hint) from error
        self.root = str(root).rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)
        # Absolute, because the working directory may change.
        self.url = str(Path(self.root).resolve()) if self.local else str(url)

    def at(self, name: str) -> str:
        """Return the full path."""
        return f"{self.root}/{name}"

    def read(self, name: str, first: int | None = None) -> bytes | None:
        """Return a file's content, or its ``first`` bytes; None if the file does not exist."""
        with self._reported(self.at(name)), contextlib.suppress(FileNotFoundError):
            return bytes(self.fs.cat_file(self.at(name), end=first))
        return None

    def sizes(self, folder: str) -> dict[str, int]:
        """Return names and sizes (bytes) of the files and links in a folder; empty if the folder does not exist."""
        with self._reported(self.at(folder)), contextlib.suppress(FileNotFoundError):
            infos = self.fs.ls(self.at(folder), detail=True)
            return {str(i["name"]).rsplit("/", 1)[-1]: int(i["size"] or 0) for i in infos if i["type"] != "directory"}
        return {}

    def names(self, folder: str) -> list[str]:
        """Return the names of the files and folders in a folder; none if it does not exist."""
        place = self.at(folder)
        with self._reported(place), contextlib.suppress(FileNotFoundError):
            listing = os.listdir(place) if self.local else self.fs.ls(place, detail=False)
            return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in listing]
        return []

    def find(self) -> dict[str, int]:
        """Return names and sizes (bytes) of all files."""
        with self._reported(self.root):
            if self.local:
                return dict(_find_local(Path(self.root)))
            infos = self.fs.find(self.root, detail=True)
            return {str(path).removeprefix(self.root).lstrip("/"): int(i["size"] or 0) for path, i in infos.items()}

    def time(self, name: str) -> datetime | None:
        """Return when a file was written, in UTC; None if it does not exist."""
        with self._reported(self.at(name)), contextlib.suppress(FileNotFoundError):
            return self.fs.modified(self.at(name)).astimezone(UTC)
        return None

    def remove(self, name: str) -> None:
        """Remove a file if it exists, with one request. A local removal is on disk when the call returns."""
        with self._reported(self.at(name)), contextlib.suppress(FileNotFoundError):
            if not self.local:
                return self.fs.rm_file(self.at(name))
            path = self.inside(name)
            path.unlink()
            sync_folder(path.parent)

    def remove_folder(self, name: str) -> None:
        """Remove a folder with its content if it exists; for a symbolic link, remove only the link.

        A local removal is on disk when the call returns.
        """
        place = self.at(name)
        with self._reported(place):
            if not self.local:
                with contextlib.suppress(FileNotFoundError):
                    self.fs.rm(place, recursive=True)
                return
            path = self.inside(name)
            while os.path.lexists(path):
                with contextlib.suppress(FileNotFoundError):  # another process removed the folder, or a file in it
                    path.unlink() if path.is_symlink() else shutil.rmtree(path)
            sync_folder(path.parent)

    def each(self, work: Callable[[T], R], values: Sequence[T]) -> Iterator[R]:
        """Yield the result of ``work``, which writes here, for each value, in order: on a local disk one by one."""
        return map(work, values) if self.local else in_threads(work, values)

    def write(self, name: str, data: bytes, *, new: bool = False) -> None:
        """Write a file: local by rename, in object stores by one put, elsewhere in place.

        With ``new``, raise FileExistsError if it exists: a local file is published with a hard link, so exactly one
        writer succeeds. Other storage uses fsspec's exclusive mode (in memory, S3, Google Cloud). Without that mode,
        existence is checked before the write, and of two simultaneous writers the last one wins.
        """
        place, mode = self.at(name), {"mode": "create"} if new else {}  # not every file system takes the argument
        with self._reported(place):
            if self.local:
                with replacing(self.inside(name), publish=os.link if new else os.replace) as temporary:
                    temporary.write(data)
                return
            if new and self.fs.exists(place):
                raise FileExistsError(place)
            try:
                self.fs.pipe_file(place, data, **mode)
            except FileNotFoundError:  # only file systems with real folders need them
                self.fs.makedirs(place.rpartition("/")[0], exist_ok=True)
                self.fs.pipe_file(place, data, **mode)

    def exposed(self) -> str:
        """Return the command that removes other users' access to the storage; empty if they have none.

        With ``MTA_SHARED=group`` the group may read. Checks the root and its direct entries: a closed folder protects
        everything below it. Storage that is not local has its own permissions.
        """
        if not self.local:
            return ""
        others, path = "o=" if is_shared() else "go=", Path(self.root)
        mask = 0o007 if is_shared() else 0o077
        with self._reported(self.root), os.scandir(path) as entries:
            mode = path.stat().st_mode
            if not mode & mask or not any(entry.stat(follow_symlinks=False).st_mode & mask for entry in entries):
                return ""
        of_group = f"   (or, if its group shares it: export {SHARED}=group)" if mode & stat.S_ISGID else ""
        return f"chmod -R {others} {shlex.quote(self.root)}{of_group}"

    def inside(self, name: str) -> Path:
        """Return the local path of a file or folder. Raises StoreError if a folder above it is a symbolic link."""
        path = Path(self.root)
        for part in name.split("/")[:-1]:
            path /= part
            if path.is_symlink():
                named = shlex.quote(str(path))
                raise StoreError(
                    f"{path} is a symbolic link, expected a folder: nothing is written or removed through it",
                    hint=f"Check where it leads, and remove it:  ls -l {named}; rm {named}",
                )
        return Path(self.at(name))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of local storage within the block, for a file that is read, changed, and written again.

        The lock does not nest. Storage without its folder, or that is not local, has no lock: of two simultaneous
        changes of one file, only the later may be kept. Raises StoreError.
        """
        if not self.local or not Path(self.root).is_dir():
            yield
            return
        path = Path(self.at(LOCK))
        try:
            open(path, "ab", opener=owner_only).close()
            lock = FileLock(path, timeout=_WAIT, mode=file_mode())
            lock.acquire()
        except OSError as error:  # includes filelock's Timeout
            hint = "Check the store's permissions, disk, and file system, and that no stopped process holds the lock."
            raise StoreError(f"{path} cannot be locked: {error.strerror or error}", hint) from error
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _reported(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileExistsError, StoreError):
            raise
        except Exception as error:
            if self.local and not isinstance(error, OSError):
                raise
            raise StoreError(  # clients of object stores raise their own errors: no credentials, no connection
                f"{path} cannot be read or written: {getattr(error, 'strerror', None) or error}",
                hint="Check the store's address, permissions and free space, then repeat. No file is half written.",
            ) from error


def _find_local(root: Path) -> Iterator[tuple[str, int]]:
    """Yield all files below a folder. Raises OSError for an unreadable folder, which fsspec would skip silently."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # removed meanwhile
            raise error

    for folder, _, names in os.walk(root, onerror=refuse):
        for path in (Path(folder, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                yield path.relative_to(root).as_posix(), path.lstat().st_size
