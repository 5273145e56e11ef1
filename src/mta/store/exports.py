"""Where a person's adapter was exported to, so that forgetting finds it: the file beside their states.

A folder's name may say who its person is, and raw ids stand in no file of a store. So the list is encrypted (Fernet:
AES-128-CBC and HMAC-SHA256, of the ``cryptography`` package) with a key that is made of the store's key and of the id.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import platform
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mta.errors import InputError, PersonForgotten, StateCorrupt
from mta.lora.peft import CARD, CONFIG, WEIGHTS, has_own_card, read_peft, remove_asides
from mta.store.lock import locked
from mta.store.tombstones import Tombstones
from mta.system.atomic import sync_folder
from mta.system.hub import Parcel
from mta.system.storage import Storage

SCHEMA = 2


@dataclass(frozen=True, slots=True)
class Export:
    """A folder an adapter was written to: on which host, its absolute path, the sha256 of the adapter's weights.

    The sha256 is empty while it is being written, and stays so where that was interrupted. One that was pushed to a
    hub has the hub's address as its host, and the repository as its folder.
    """

    host: str
    folder: str
    sha256: str = ""

    @classmethod
    def begun(cls, folder: str | Path) -> Export:
        """One that is about to be written on this host."""
        return cls(platform.node(), str(Path(folder).resolve()))

    @classmethod
    def pushed(cls, folder: str | Path, host: str, repository: str) -> Export:
        """The adapter of a folder, in a repository of a hub."""
        return cls(host, repository, _sha256(Path(folder) / WEIGHTS))

    def done(self) -> Export:
        """The same, now that the adapter lies in its folder."""
        return replace(self, sha256=_sha256(Path(self.folder) / WEIGHTS))

    def remove(self) -> str:
        """Remove the adapter's files, and the folder where nothing else is in it. Why not, in words, or nothing.

        Only on the host it was written on, and only while the weights are the very ones: whatever lies there now may be
        somebody else's. The weights go last, so that an interrupted removal can be repeated.
        """
        folder = Path(self.folder)
        if "://" in self.host:
            return f"{self.host}/{self.folder} (pushed there: delete it by hand)"
        if self.host != platform.node():
            return f"{self.folder} (on the host {self.host!r})"
        if why := _remove_asides(folder):
            return f"{self.folder} ({why})"
        try:
            if _sha256(folder / WEIGHTS) != self.sha256:
                return f"{self.folder} ({'its adapter was changed since' if self.sha256 else 'it was interrupted'})"
            (folder / CONFIG).unlink(missing_ok=True)
            if has_own_card(folder):
                (folder / CARD).unlink()
            (folder / WEIGHTS).unlink()
            sync_folder(folder)
        except (FileNotFoundError, NotADirectoryError):
            if why := self._missing():
                return f"{self.folder} ({why})"
        except OSError as error:
            return f"{self.folder} ({error.strerror})"
        with contextlib.suppress(OSError):  # other files are in it, or it is not there any more
            folder.rmdir()
            sync_folder(folder.parent)
        return ""

    def _missing(self) -> str:
        """Where the weights may be that are not in their folder, in words; nothing where nothing was finished."""
        folder = Path(self.folder)
        if self.sha256 and not folder.parent.is_dir():
            return "nor is the folder around it there: is a disk not mounted?"
        if self.sha256 and not folder.is_dir():
            return "not there any more: it was removed before, or moved"
        if self.sha256 and any(folder.iterdir()):
            return "its weights are not there any more: they were removed before, or renamed"
        return ""

    def is_final(self) -> bool:
        """Whether ``remove`` will never remove what it left: it was pushed to a hub, changed since, or moved.

        What lies on another host, on a disk that is not mounted, or where this process may not write can be removed
        later. Moved means the folder or the weights in it.
        """
        folder = Path(self.folder)
        if "://" in self.host or self.host != platform.node():
            return "://" in self.host
        try:
            return _sha256(folder / WEIGHTS) != self.sha256
        except FileNotFoundError:
            return folder.parent.is_dir()
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class Exports:
    """The lists of exports of a store's people, each beside its person's states: ``path`` and ``secret`` take an id.

    ``path`` begins a store that is not there yet if its second argument says so.
    """

    files: Storage
    path: Callable[[str, bool], str]
    secret: Callable[[str], bytes]
    tombstones: Tombstones

    def of(self, id: str) -> list[Export]:
        """Where a person's adapters were exported to. Raises StateCorrupt."""
        data = self.files.read(name := f"{self.path(id, False)}/exports.json")
        return [] if data is None else exports_from_bytes(data, self.secret(id), self.files.at(name))

    @contextlib.contextmanager
    def writing(self, id: str, folder: str | Path, since: Collection[str] | None = None) -> Iterator[None]:
        """Within the block an adapter of a person is written to a folder of this host, for ``remove`` to find.

        It is noted before it is there, so that a killed export is found too. Exports of one person may overlap. If the
        person was forgotten after the tombstones ``since`` were found, the export is removed again. Raises
        StateCorrupt, PersonForgotten.
        """
        self.tombstones.check(id, since)
        export = Export.begun(folder)
        self._change(id, lambda known: [*known, export])  # what lies there until the new one takes its place stays
        try:
            yield
        except Exception:  # refused, or no room for it: what lay there before lies there still
            self._change(id, lambda known: _without(known, export))
            self._keep_out(id, since)
            raise
        self._change(id, lambda known: [*_elsewhere(known, export), export.done()])
        self._keep_out(id, since)

    def note(self, id: str, export: Export, since: Collection[str] | None = None) -> None:
        """Note an adapter that is about to be pushed elsewhere: forgetting can only name it.

        ``since`` is as in ``writing``. Raises StateCorrupt, PersonForgotten.
        """
        self._change(id, lambda known: [*_elsewhere(known, export), export])
        self._keep_out(id, since)

    def remove(self, id: str) -> dict[Export | None, str]:
        """Remove what was exported of a person; return what is left, and why."""
        try:
            return {export: left for export in self.of(id) if (left := export.remove())}
        except StateCorrupt as error:  # a damaged list must not stop forgetting
            return {None: f"whatever was exported of them ({error.message})"}

    def forget(self, id: str, keep: bool = False) -> dict[Export | None, str]:
        """``remove``, and keep on the list only what a later call may remove; with ``keep`` all that is left."""
        with locked(self.files):
            left = self.remove(id)
            self._write(id, [export for export in left if export and (keep or not export.is_final())])
        return left

    def _change(self, id: str, change: Callable[[list[Export]], list[Export]]) -> None:
        """Replace the list by what ``change`` makes of it as it is now."""
        self.path(id, True)  # begins the store, and with it the folder of the lock
        with locked(self.files):
            self._write(id, change(self.of(id)))

    def _keep_out(self, id: str, since: Collection[str] | None) -> None:
        """Remove exports and their list if the person was forgotten meanwhile, and raise PersonForgotten."""
        try:
            self.tombstones.check(id, since)
        except PersonForgotten:
            self.forget(id)
            raise

    def _write(self, id: str, exports: Sequence[Export]) -> None:
        path = self.path(id, bool(exports))
        if exports:
            self.files.replace(f"{path}/exports.json", exports_to_bytes(exports, self.secret(id)))
        else:
            self.files.remove(f"{path}/exports.json")
            remove_if_empty(self.files, path)


def remove_if_empty(files: Storage, folder: str) -> None:
    """Remove a person's folder if nothing is in it: even that would tell that the person was here.

    Never with what a writer puts there in this moment. Object stores have no folders: nothing is removed there.
    """
    if not files.local:
        with contextlib.suppress(Exception):  # clients have errors of their own, and most have no folders
            files.fs.rmdir(files.at(folder))
        return
    path = files.inside(folder)
    with contextlib.suppress(OSError):  # something is in it, or it is not there any more
        path.rmdir()
        sync_folder(path.parent)


def _remove_asides(folder: Path) -> str:
    """``remove_asides``, once more where one vanished meanwhile. Why not all went, in words, or nothing."""
    try:
        try:
            remove_asides(folder)
        except FileNotFoundError:
            remove_asides(folder)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _elsewhere(exports: Sequence[Export], export: Export) -> list[Export]:
    """Those that lie in other places than ``export``."""
    return [known for known in exports if (known.host, known.folder) != (export.host, export.folder)]


def _without(exports: Sequence[Export], export: Export) -> list[Export]:
    """All but the last that equals ``export``; an earlier one was killed."""
    left = list(exports)
    if export in left:
        left.reverse()
        left.remove(export)
        left.reverse()
    return left


def adapter_parcel(folder: Path) -> Parcel:
    """What would leave this machine if the adapter that was exported to a folder were pushed; nothing is sent.

    A base that lies in a folder here is called by the folder's name alone. Raises InputError.
    """
    read_peft(folder)  # whole, and plain
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    base = str(config.get("base_model_name_or_path") or "")
    base = Path(base).name if Path(base).is_absolute() or Path(base).is_dir() else base
    if not has_own_card(folder):
        raise InputError(
            f"{folder} has no card that mta export wrote: what its {CARD} says would be published unread",
            hint="Export to a new folder, and push that.",
        )
    data = json.dumps(config | {"base_model_name_or_path": base}, indent=2).encode() + b"\n"
    facts = {
        "people": "this is one person's model: it was trained on their texts and tells something of them. "
        "Push it only where they agree, and under a name that does not say who they are",
        "base": base,
        "forgetting": "mta forget names the repository; deleting it, and copies others made, is by hand",
    }
    return Parcel({CARD: folder / CARD, CONFIG: data, WEIGHTS: folder / WEIGHTS}, facts)


def exports_to_bytes(exports: Sequence[Export], key: bytes) -> bytes:
    """Encrypt a list of exports as JSON under ``key``, with a sha256 by which damage is found without the key."""
    from cryptography.fernet import Fernet

    rows = json.dumps([asdict(export) for export in exports]).encode()
    token = Fernet(_fernet_key(key)).encrypt(rows).decode()
    return json.dumps({"schema": SCHEMA, "sha256": _sealed(token), "exports": token}).encode()


def exports_from_bytes(data: bytes, key: bytes, source: str = "the file") -> list[Export]:
    """The inverse of ``exports_to_bytes``; reads schema 1 too. Raises StateCorrupt, under another key too."""
    from cryptography.fernet import Fernet, InvalidToken

    hidden = check_exports(data, source)
    try:
        rows = Fernet(_fernet_key(key)).decrypt(hidden) if isinstance(hidden, str) else _of_schema_1(hidden, key)
        return [Export(**row) for row in json.loads(rows)]
    except (InvalidToken, ValueError, TypeError, RecursionError):
        raise _corrupt(source, "another key") from None


def check_exports(data: bytes, source: str = "the file") -> str | list[str]:
    """Check without the key that the file is whole; returns what it holds, still encrypted. Raises StateCorrupt."""
    try:
        value = json.loads(data)
        hidden, schema = value["exports"], value["schema"]
        if schema not in (1, SCHEMA) or value["sha256"] != _sealed(hidden):
            raise ValueError("another schema or sha256")
        if not isinstance(hidden, str if schema == SCHEMA else list):
            raise TypeError(type(hidden).__name__)
        return hidden
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _corrupt(source, repr(error)) from error


def _corrupt(source: str, got: str) -> StateCorrupt:
    return StateCorrupt(
        f"{source} was changed or cut short: got {got}, expected schema 1 or {SCHEMA} and a list that fits the sha256",
        hint="Remove it; adapters that were exported before must then be found and removed by hand.",
    )


def _fernet_key(key: bytes) -> bytes:
    return base64.urlsafe_b64encode(hashlib.sha256(key).digest())


def _of_schema_1(hidden: list[str], key: bytes) -> bytes:
    """Decrypt a list of mta 0.1.0, which wrote a nonce and the list under a keystream of SHAKE-256. Never written."""
    nonce, veiled = map(bytes.fromhex, hidden)
    stream = hashlib.shake_256(key + nonce).digest(len(veiled))
    return bytes(a ^ b for a, b in zip(veiled, stream))


def _sealed(rows: object) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
