"""Files under a folder or any fsspec URL: whole or not at all, and created by one writer only."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from mta.aside import written_aside
from mta.errors import StoreError

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV}


class Storage:
    """The few things a store does with files, by names below its root; failures become StoreError."""

    def __init__(self, url: str | Path) -> None:
        try:
            self.fs, root = url_to_fs(str(url), use_listings_cache=False)  # others write too
        except (ImportError, ValueError) as error:
            hint = "Give a folder, or a URL that fsspec knows (s3://bucket/people)."
            raise StoreError(f"the store cannot be opened: {error}", hint=hint) from error
        self.root = str(root).rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)
        self.url = str(Path(self.root).resolve()) if self.local else str(url)  # means the same in any folder

    def at(self, name: str) -> str:
        """The full path."""
        return f"{self.root}/{name}"

    def read(self, name: str, first: int | None = None) -> bytes | None:
        """A whole file, or its ``first`` bytes; None where there is none."""
        with self._reported(self.at(name)), contextlib.suppress(FileNotFoundError):
            return bytes(self.fs.cat_file(self.at(name), end=first))
        return None

    def exists(self, name: str) -> bool:
        with self._reported(self.at(name)):
            return bool(self.fs.exists(self.at(name)))

    def sizes(self, folder: str) -> dict[str, int]:
        """Names and sizes of the files in a folder; empty without one."""
        with self._reported(self.at(folder)), contextlib.suppress(FileNotFoundError):
            infos = self.fs.ls(self.at(folder), detail=True)
            return {str(i["name"]).rsplit("/", 1)[-1]: int(i["size"] or 0) for i in infos if i["type"] == "file"}
        return {}

    def find(self, depth: int | None = None) -> dict[str, int]:
        """Names and sizes of all files, ``depth`` levels down."""
        with self._reported(self.root):
            if self.local:
                return dict(_find_local(Path(self.root), depth))
            found = self.fs.find(self.root, maxdepth=depth, detail=True)
            return {str(path).removeprefix(self.root).lstrip("/"): int(i["size"] or 0) for path, i in found.items()}

    def age(self, name: str) -> float:
        """Seconds since a file was written; 0 for one that is not there."""
        with self._reported(self.at(name)), contextlib.suppress(FileNotFoundError):
            return (datetime.now(UTC) - self.fs.modified(self.at(name)).astimezone(UTC)).total_seconds()
        return 0.0

    def remove(self, name: str) -> None:
        """Remove a file, if it is there: one request, however far away it lies."""
        with self._reported(self.at(name)), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.at(name))

    def remove_folder(self, name: str) -> None:
        """Remove a folder and whatever is left in it, if it is there."""
        with self._reported(self.at(name)), contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.at(name), recursive=True)

    def replace(self, name: str, data: bytes) -> None:
        """Write a file, locally by rename; object stores put whole files, others are overwritten in place."""
        with self._reported(self.at(name)):
            if not self.local:
                return self._put(name, data)
            with written_aside(Path(self.at(name))) as aside:
                aside.write_bytes(data)

    def create(self, name: str, data: bytes, mode: int = 0o666) -> None:
        """Write a file that must not exist yet, else FileExistsError; ``mode`` is what the umask leaves of it, locally.

        Locally a link publishes it whole and to one writer only. Elsewhere it is fsspec's exclusive mode (in memory,
        S3, Google Cloud); without one it checks, then writes, and of two writers at one instant the last wins.
        """
        with self._reported(self.at(name)):
            if self.local:
                return _create_local(Path(self.at(name)), data, mode)
            if self.fs.exists(self.at(name)):
                raise FileExistsError(self.at(name))
            self._put(name, data, mode="create")

    @contextlib.contextmanager
    def _reported(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileExistsError, StoreError):
            raise
        except Exception as error:
            if self.local and not isinstance(error, OSError):
                raise
            raise StoreError(  # clients of object stores have errors of their own: no credentials, nobody there
                f"{path} cannot be read or written: {getattr(error, 'strerror', None) or error}",
                hint="Check the store's address, permissions and free space, then repeat: nothing is half written.",
            ) from error

    def _put(self, name: str, data: bytes, **how: Any) -> None:
        try:
            self.fs.pipe_file(self.at(name), data, **how)
        except FileNotFoundError:  # only file systems with real folders ask for them
            self.fs.makedirs(self.at(name).rsplit("/", 1)[0], exist_ok=True)
            self.fs.pipe_file(self.at(name), data, **how)


def _create_local(path: Path, data: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _link(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _link(aside: Path, path: Path) -> None:
    try:
        os.link(aside, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with path.open("xb") as file:  # still one winner; killed right here, its half file reads as corrupt
            file.write(aside.read_bytes())


def _find_local(root: Path, depth: int | None) -> Iterator[tuple[str, int]]:
    """All files below a folder; one that cannot be listed is an error, where fsspec would pass over it in silence."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # it was removed meanwhile
            raise error

    for folder, folders, names in os.walk(root, onerror=refuse):
        place = Path(folder).relative_to(root)
        if depth is not None and len(place.parts) + 1 >= depth:
            folders.clear()
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                yield (place / name).as_posix(), Path(folder, name).lstat().st_size
