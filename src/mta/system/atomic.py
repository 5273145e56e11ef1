"""Atomic writes of private files: write a temporary file, flush it, rename it.

Files with personal data are created with mode 0600, and folders for them with mode 0700, for any umask. With
``MTA_SHARED=group`` in the environment the modes are 0660 and 2770: the folder's group can read and write. An existing
folder keeps its mode. ``private=False`` is for files without personal data (the cache): the umask sets their mode.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shlex
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from filelock import FileLock, Timeout

from mta.errors import ConfigError, InputError, StoreError

if TYPE_CHECKING:
    from torch import Tensor

SHARED = "MTA_SHARED"
_UNSUPPORTED = {errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def is_shared() -> bool:
    """Return whether files are shared with a group. Raises ConfigError for an unknown value of ``MTA_SHARED``."""
    value = os.environ.get(SHARED, "")
    if value not in ("", "group"):
        raise ConfigError(f"{SHARED} is {value!r}, expected 'group' or nothing", hint=f"export {SHARED}=group")
    return value == "group"


def file_mode() -> int:
    """Return the mode of a file with personal data: for its owner only, or also for the sharing group."""
    return 0o660 if is_shared() else 0o600


def owner_only(path: str, flags: int) -> int:
    """Open a file that only its owner (or the sharing group) can read. Use as ``opener`` of ``open()``.

    Does not follow a symbolic link. Tightens the mode of an existing file. Raises StoreError, without changes, if the
    existing file may belong to another user: see ``_check_own``.
    """
    mode = file_mode()
    try:  # O_NONBLOCK: opening a pipe would wait for a reader; truncate only after the checks
        file = os.open(path, flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, mode)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise _not_own(path, "not a regular file") from None
        raise
    try:
        status = os.fstat(file)
        if not flags & os.O_EXCL:
            _check_own(path, status)
        if stat.S_IMODE(status.st_mode) != mode and status.st_uid == os.geteuid():
            with _where_supported():  # not every file system has modes
                os.fchmod(file, mode)
        if flags & os.O_TRUNC:
            os.ftruncate(file, 0)
    except BaseException:
        os.close(file)
        raise
    return file


def _check_own(path: str, status: os.stat_result) -> None:
    """Raise StoreError for a file that another user may have placed there to read the data; skip if group-shared."""
    if is_shared():
        return
    if not stat.S_ISREG(status.st_mode):
        raise _not_own(path, "not a regular file")
    if status.st_uid != os.geteuid():
        raise _not_own(path, f"a file of user {status.st_uid}")
    if status.st_nlink > 1:
        raise _not_own(path, f"a file with {status.st_nlink} names")


def _not_own(path: str, kind: str) -> StoreError:
    return StoreError(
        f"{path} is not written: it is {kind}, expected your own file (user {os.geteuid()}) with one name",
        hint=f"Move it away:  mv {shlex.quote(str(path))} {shlex.quote(f'{path}.old')}\n"
        f"  If a group shares the folder:  export {SHARED}=group",
    )


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append lines to a file of its owner; first ends a line that a killed process left incomplete."""
    with open(path, "ab+", opener=owner_only) as file:
        torn = file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        file.write(("\n" * torn + "".join(f"{line}\n" for line in lines)).encode())


def make_folder(path: Path, private: bool = True) -> None:
    """Create a folder and missing parents; an existing folder keeps its mode. Raises FileExistsError for a file."""
    if not private:
        path.mkdir(parents=True, exist_ok=True)
        return
    shared = is_shared()
    for folder in reversed((path, *path.parents)):
        try:
            folder.mkdir(mode=0o770 if shared else 0o700)
        except OSError:
            if not folder.is_dir():
                raise
            continue
        if shared:
            with _where_supported():
                folder.chmod(0o2770)
        sync_folder(folder.parent)


@contextlib.contextmanager
def replacing(
    path: Path, private: bool = True, publish: Callable[[Path, Path], object] = os.replace
) -> Iterator[IO[bytes]]:
    """Yield a new temporary file in the folder of ``path``. After the block, flush it and rename it to ``path``.

    On an error in the block, the temporary file is removed. The rename is on disk when the block ends.
    ``publish(temporary, path)`` replaces the rename. Raises InputError for a device or a pipe, which a rename would
    replace.
    """
    check_ordinary(path)
    make_folder(path.parent, private)
    temporary = _temporary(path)
    try:
        with open(temporary, "xb", opener=owner_only if private else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextlib.contextmanager
def replacing_folder(
    path: Path, publish: Callable[[Path, Path], object] = Path.rename, *, inside: bool = False
) -> Iterator[Path]:
    """Yield the path of a temporary folder beside ``path``, or ``inside`` it. After the block, rename it to ``path``.

    ``path`` is missing or an empty folder, unless ``publish(temporary, path)`` replaces the rename. On an error in the
    block, the temporary folder is removed.
    """
    path = path.absolute()  # "." cannot be replaced
    temporary = _temporary(path / path.name if inside else path)
    try:
        yield temporary
        publish(temporary, path)
        sync_folder(temporary.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """Return a new name beside ``path``, which ``unfinished_in`` finds if the writer is killed."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def check_ordinary(path: Path) -> None:
    """Raise InputError for a path that leads to a device or a pipe, or to a file by a name like /dev/stdout."""
    system = path.parent.resolve().parts in (("/", "dev"), ("/", "proc", str(os.getpid()), "fd"))
    if system or (path.exists() and not path.is_file() and not path.is_dir()):
        raise InputError(f"{path} is a device or a pipe, expected a file", hint="Give the name of another file.")


def unfinished_in(folder: Path, name: str) -> Iterator[Path]:
    """Return the temporary files and folders that killed writers of ``name``, a glob pattern, left in a folder."""
    return folder.glob(f".{name}.{'[0-9a-f]' * 32}")


def sync_folder(path: Path) -> None:
    """Flush a folder, so that created, renamed and removed files are on disk. Does nothing if unsupported."""
    with _where_supported(), contextlib.suppress(FileNotFoundError):  # another process may have removed it
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
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


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write(text.encode())


def write_json(path: Path, value: object, private: bool = True) -> None:
    """Write a JSON file atomically. Names of files that are not UTF-8 are escaped."""
    with replacing(path, private) as temporary:
        temporary.write(json.dumps(value, indent=1, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    from safetensors.torch import save

    with replacing(path) as temporary:
        temporary.write(save(dict(tensors), dict(header or {})))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, but not its mode, atomically."""
    with source.open("rb") as original, replacing(target) as temporary:
        shutil.copyfileobj(original, temporary)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: object) -> str:
    """Return the sha256 of a value as JSON; keys are hashed in their order."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def read_json(path: Path) -> object:
    """Return the content of a JSON file, or None if the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


@contextlib.contextmanager
def _where_supported() -> Iterator[None]:
    """Ignore the errors of file systems that do not support the operation in the block."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
