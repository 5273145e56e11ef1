"""The store: people's states and, only by opt-in, their histories, under any fsspec URL.

    store.json                            schema version and the key of the hash
    <2 hex>/<keyed hash of the id>/
        1.safetensors, 2.safetensors ...  states, each created once and never changed
        history.json                      only if ``save_history`` was called
        exports.json                      where adapters were exported to, with the names of the folders
    forgotten/                            records that a person was forgotten, for a week (``tombstones``)
    work/                                 checkpoints of interrupted runs (``run_checkpoints``)
    .lock                                 only in local stores: one process at a time changes a history or exports

Raw ids are in no file; but folders in exports.json may be named after people. Readers of store.json can test a guessed
id, so protect this file like the data.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mta.data.history import Person
from mta.errors import InputError, PersonForgotten, PersonNotFound, StateCorrupt, StoreConflict, StoreError
from mta.store.exports import Exports, remove_if_empty
from mta.store.run_checkpoints import KEY_FILE
from mta.store.state import HEADER_BYTES, State, history_from_bytes, history_to_bytes, seal_of
from mta.store.tombstones import Tombstones, forgotten_meanwhile
from mta.system.storage import Storage

_VERSION = re.compile(r"([1-9][0-9]*)\.safetensors")
_OUTER, _KEY = re.compile("[0-9a-f]{2}"), re.compile("[0-9a-f]{64}")
KEY_SCHEMA = 1


class Store:
    """States and opt-in histories of people under a folder or any fsspec URL.

    >>> store = Store("people/")
    >>> store.save("ann", state)        # 1; the same work again is still 1
    >>> store.load("ann").w, "bob" in store
    """

    def __init__(self, url: str | Path) -> None:
        self.files = Storage(url)
        self.tombstones = Tombstones(self.files, self._buried)
        self.exports = Exports(self.files, self._path)
        self._key = b""

    def session(self, id: str | None = None) -> Session:
        """Begin a session for everybody, or for the person ``id``: begin it before you read."""
        return Session(self, self.tombstones.names() if id is None else self.tombstones.of(id))

    def identity(self, write: bool = False) -> str:
        """Return a digest of the store's key, because on other hosts the same address may be another store.

        Returns "" for a missing store; ``write`` creates it.
        """
        self._know_key(write)
        return hashlib.sha256(b"identity/" + self._key).hexdigest()[:16] if self._key else ""

    def check(self) -> None:
        """Raise StoreError if the store is missing or its key damaged, which could look like an unknown person."""
        if self.files.read(KEY_FILE) is None:
            raise StoreError(
                f"there is no store at {self.files.root}",
                hint="Give the store's address, or create a store:  mta personalize",
            )
        self._open(write=False)

    def save(self, id: str, state: State) -> int:
        """Save a state in a session of this person that begins now: see ``Session.save``."""
        return self.session(id).save(id, state)

    def load(self, id: str, version: int | None = None) -> State:
        """Return the latest state of a person, or an earlier version. Raises PersonNotFound, StateCorrupt."""
        chosen = self.latest(id) if version is None else version
        data = None if chosen is None else self.files.read(name := f"{self._path(id)}/{chosen}.safetensors")
        if data is not None:
            return State.from_bytes(data, self.files.at(name))
        if there := self.versions(id):
            raise PersonNotFound(
                f"{id!r} has no version {chosen}; expected one of: {', '.join(map(str, there))}",
                hint=f"Choose one of these, for example {there[-1]}, or none: the latest.",
            )
        where = f"in the store {self.files.root}"
        raise PersonNotFound(f"no state of {id!r} {where}", hint="Personalize first:  mta personalize")

    def rollback(self, id: str, version: int) -> int:
        """Save an earlier version's content as the newest version, as ``save`` does, and return its number.

        Raises PersonNotFound (which lists the versions), StateCorrupt, StoreConflict.
        """
        return self.session(id).save(id, self.load(id, version))

    def seal(self, id: str, version: int) -> str | None:
        """Return the sha256 of a version's content, read from the start of its file; None if there is no such version.

        After ``forget``, a person's versions start at 1 again: the number does not identify the content.
        """
        beginning = self.files.read(f"{self._path(id)}/{version}.safetensors", HEADER_BYTES)
        return None if beginning is None else seal_of(beginning)

    def latest(self, id: str) -> int | None:
        """Return the number of the newest version, or None."""
        return max(map(version_of, self.files.names(self._path(id))), default=0) or None

    def versions(self, id: str) -> list[int]:
        """Return the numbers of all versions, oldest first."""
        return sorted(filter(None, map(version_of, self.files.names(self._path(id)))))

    def time_of(self, id: str, version: int) -> str | None:
        """Return when a version was saved, as ISO 8601; None without that version."""
        time = self.files.time(f"{self._path(id)}/{version}.safetensors")
        return time.isoformat(timespec="seconds") if time else None

    def __contains__(self, id: str) -> bool:
        return self.latest(id) is not None

    def nbytes(self, id: str) -> int:
        """Return the bytes stored for a person: all versions, history, exports."""
        return sum(self.files.sizes(self._path(id)).values())

    def save_history(self, person: Person) -> None:
        """Save a history in a session of this person that begins now: see ``Session.save_history``."""
        self.session(person.id).save_history(person)

    def history(self, id: str) -> Person | None:
        """Return what ``save_history`` saved, or None. Raises StateCorrupt."""
        data = self.files.read(name := f"{self._path(id)}/history.json")
        return None if data is None else history_from_bytes(id, data, self.files.at(name))

    def remove(self, id: str) -> bool:
        """Remove a person's history, then states from the oldest on; return False if there were none.

        After a crash the newest state is still found under the id, and the call can be repeated.
        ``personalize.forgetting`` does the other steps.
        """
        path = self._path(id)
        names = [name for name in self.files.sizes(path) if name != "exports.json"]
        for name in sorted(names, key=version_of):
            self.files.remove(f"{path}/{name}")
        remove_if_empty(self.files, path)
        return bool(names)

    def _path(self, id: str, write: bool = False) -> str:
        if not isinstance(id, str) or not id:
            raise InputError(f"a person's id is {id!r}, expected a non-empty text", hint="Give every person an id.")
        self._know_key(write)
        keyed = hmac.new(self._key, id.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
        return f"{keyed[:2]}/{keyed}"

    def _buried(self, id: str) -> str:
        """Return the hash that names a person's tombstones; "" for a missing store.

        Its key is derived from the store's, so that a tombstone cannot be matched with a person's folder.
        """
        self._path(id)  # reads the store's key on first use
        own = hashlib.sha256(b"forgotten/" + self._key).digest()
        return hmac.new(own, id.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest() if self._key else ""

    def _know_key(self, write: bool) -> None:
        """Read the key once, and again before writing to a local folder, which may have been created anew."""
        if not self._key or (write and self.files.local):
            self._key = self._open(write)

    def _open(self, write: bool) -> bytes:
        """Return the store's HMAC key. For a missing store, ``write`` creates a key; otherwise the key is empty."""
        data = self.files.read(KEY_FILE)
        outer = filter(_OUTER.fullmatch, self.files.names("")) if data is None else ()
        if any(_KEY.fullmatch(name) for folder in outer for name in self.files.names(folder)):  # people without a key
            data = self.files.read(KEY_FILE) or b"nothing"  # read again: another writer may just have created it
        if data is None and write:
            made = {"schema": KEY_SCHEMA, "key": secrets.token_hex(32)}
            with contextlib.suppress(FileExistsError):
                self.files.write(KEY_FILE, json.dumps(made).encode(), new=True)
            data = self.files.read(KEY_FILE)  # the key of the first writer
        if data is None:
            return b""
        try:
            value = json.loads(data)
            if value["schema"] != KEY_SCHEMA or not _KEY.fullmatch(value["key"]):
                raise ValueError(f"schema {value['schema']!r}")
            return bytes.fromhex(value["key"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreError(
                f"{self.files.at(KEY_FILE)} is damaged or missing: expected schema {KEY_SCHEMA} and a 64-digit key",
                hint="Restore the file from a backup: without its key, no person in the store can be found.",
            ) from error


@dataclass(frozen=True, slots=True)
class Session:
    """Saves nothing for people who were forgotten after it began. Begin it before people's items are read.

    ``known`` are the tombstones that existed when the session began.
    """

    store: Store
    known: frozenset[str]

    @classmethod
    def joint(cls, sessions: Iterable[Session]) -> Session:
        """Return one session of the people of several sessions, at least one, which ``Store.session(id)`` began."""
        first, *others = sessions
        return cls(first.store, first.known.union(*(other.known for other in others)))

    def forgotten(self, ids: Iterable[str]) -> set[str]:
        """Return the people among ``ids`` who were forgotten since the session began, from one listing."""
        return self.store.tombstones.since(ids, self.known)

    def check(self, id: str) -> None:
        """Raise PersonForgotten if a person was forgotten since the session began."""
        if self.forgotten([id]):
            raise forgotten_meanwhile()

    def save(self, id: str, state: State, after: int | None = None) -> int:
        """Save a state as the next version and return its number; if the latest has the same work, do nothing.

        ``after`` is the version that was the latest when the work began, 0 for none. Raises PersonForgotten, and
        StoreConflict if another writer saved other work since then.
        """
        self.check(id)
        store = self.store
        path, last = store._path(id, write=True), store.latest(id) or 0
        if last and self._work(f"{path}/{last}.safetensors") == state.work:
            return last
        if after is not None and last != after:
            raise overtaken(id)
        version = last + 1
        name = f"{path}/{version}.safetensors"
        try:
            store.files.write(name, state.to_bytes(), new=True)
        except FileExistsError:
            if self._work(name) != state.work:  # if equal, perhaps by an earlier attempt of this call
                raise StoreConflict(
                    f"version {version} of {id!r} was created by another writer meanwhile; this state was not saved",
                    hint=f"Save again: it becomes version {version + 1}.",
                ) from None
        except StoreError:  # the state may have been written nevertheless
            self._keep_out(id, name)
            raise
        self._keep_out(id, name)
        return version

    def save_history(self, person: Person) -> None:
        """Save a person's items and queries (opt-in), replacing those saved before. Raises PersonForgotten."""
        self.change_history(person.id, lambda: person)

    def change_history(self, id: str, made: Callable[[], Person]) -> Person:
        """Save and return the history that ``made`` returns, which may read ``Store.history``.

        In a local store, no other process changes it meanwhile; so ``made`` must save and export nothing itself.
        Raises PersonForgotten, and what ``made`` raises.
        """
        path = self.store._path(id, write=True)  # creates a new store, in which the lock is a file
        with self.store.files.locked():
            person = made()
            self.check(id)
            try:
                self.store.files.write(f"{path}/history.json", history_to_bytes(person))
            finally:
                self._keep_out(id, f"{path}/history.json")
        return person

    @contextlib.contextmanager
    def exporting(self, id: str, folder: str | Path) -> Iterator[Callable[[Path], None]]:
        """Record that a person's adapter is written to a folder of this host within the block. See ``Exports.writing``.

        If the person was forgotten meanwhile, the export is removed again. Raises StateCorrupt, PersonForgotten.
        """
        self.check(id)
        try:
            with self.store.exports.writing(id, folder) as written:
                yield written
        finally:
            if self.forgotten([id]):
                self.store.exports.forget(id)
                raise forgotten_meanwhile()

    def _keep_out(self, id: str, name: str) -> None:
        """Remove a file that was just written if the person was forgotten meanwhile, and raise PersonForgotten.

        ``forget`` writes its tombstone before it lists files, so it finds this file, or this call the tombstone. If
        tombstones cannot be listed (StoreError), a new state is removed too, but a replaced history is kept.
        """
        folder, _, file = name.rpartition("/")
        try:
            self.check(id)
        except StoreError as error:
            if isinstance(error, PersonForgotten) or version_of(file):
                self.store.files.remove(name)
            remove_if_empty(self.store.files, folder)
            raise

    def _work(self, name: str) -> str | None:
        """Return the work key of a state; None if it cannot be read, so that damaged states are replaced."""
        try:
            return State.from_bytes(self.store.files.read(name) or b"").work
        except StateCorrupt:
            return None


def version_of(name: str) -> int:
    """Return the version in a state file's name; 0 for other files."""
    return int(match[1]) if (match := _VERSION.fullmatch(name)) else 0


def overtaken(id: str) -> StoreConflict:
    """Return the error for a state that was made while another writer saved a newer one."""
    return StoreConflict(
        f"a newer version of {id!r} was saved meanwhile; what was made from the one before was not",
        hint="Repeat it with --update to go on from the newer one; without, your file's items replace it.",
    )
