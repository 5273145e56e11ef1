"""What is kept of people: their states and, by opt-in only, their histories, under any fsspec URL.

    store.json                            schema version and the key of the hash
    <2 hex>/<keyed hash of the id>/
        1.safetensors, 2.safetensors ...  states, each created once and never changed
        latest.json                       a hint for readers: version, time, work
        history.json                      only what ``save_history`` was given
        exports.json                      where adapters were exported to, readable only with the id
    forgotten/                            that a person was forgotten, for a week (``tombstones``)
    .lock                                 locally, for one writer at a time (``store_lock``)

Raw ids appear nowhere; whoever holds store.json can test a guessed id, so guard it as the data itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mta.data.history import Person
from mta.errors import InputError, PersonForgotten, PersonNotFound, StateCorrupt, StoreConflict, StoreError
from mta.store.exports import Exports, remove_if_empty
from mta.store.state import SCHEMA, SEALED, State, history_from_bytes, history_to_bytes, seal_of
from mta.store.tombstones import Tombstones
from mta.system.storage import Storage

_VERSION = re.compile(r"([1-9][0-9]*)\.safetensors")
_PERSON = re.compile(r"([0-9a-f]{2}/[0-9a-f]{64})/")
_KEY = re.compile("[0-9a-f]{64}")


class Store:
    """States and opted-in histories of people under a folder or any fsspec URL.

    >>> store = Store("people/")
    >>> store.save("ann", state)        # 1; the same work again is still 1
    >>> store.load("ann").w, "bob" in store, store.forget("ann")
    """

    def __init__(self, url: str | Path) -> None:
        self.files = Storage(url)
        self.tombstones = Tombstones(self.files, self._buried)
        self.exports = Exports(self.files, self._path, self._secret, self.tombstones)
        self._key = b""

    def identity(self, write: bool = False) -> str:
        """Names this very store, by a digest of its key: elsewhere the same address may mean another.

        ``write`` begins it where nobody has written yet; else it has no name there.
        """
        self._key = self._key or self._open(write)
        return hashlib.sha256(b"identity/" + self._key).hexdigest()[:16] if self._key else ""

    def check(self) -> None:
        """Raises StoreError where there is no store, or its key is damaged: neither may look like an unknown person."""
        if self.files.read("store.json") is None:
            raise StoreError(
                f"there is no store at {self.files.root}",
                hint="Give its address, or begin one:  mta personalize",
            )
        self._open(write=False)

    def save(self, id: str, state: State, since: Collection[str] | None = None) -> int:
        """Store a state as the next version and return its number; if the latest is of the same work, nothing happens.

        ``since`` are the tombstones that were there when the items came in which the state was made of. Raises
        PersonForgotten if the person was forgotten after that, and StoreConflict if another writer created that version
        first, with other work in it.
        """
        self.tombstones.check(id, since)
        path, last = self._path(id, write=True), self.latest(id) or 0
        if last and self._work(f"{path}/{last}.safetensors") == state.work:
            return last
        version = last + 1
        try:
            self.files.create(f"{path}/{version}.safetensors", state.to_bytes())
            pointer = {"version": version, "time": datetime.now(UTC).isoformat(timespec="seconds"), "work": state.work}
            self.files.replace(f"{path}/latest.json", json.dumps(pointer).encode())
        except FileExistsError:
            if self._work(f"{path}/{version}.safetensors") == state.work:
                return version
            raise StoreConflict(
                f"version {version} of {id!r} was created by another writer meanwhile; this state was not saved",
                hint=f"Save again: it becomes version {version + 1}.",
            ) from None
        except StoreError:  # the state may be there all the same
            self._keep_out(id, since, f"{version}.safetensors", "latest.json")
            raise
        self._keep_out(id, since, f"{version}.safetensors", "latest.json")
        return version

    def load(self, id: str, version: int | None = None) -> State:
        """The latest state of a person, or an earlier version. Raises PersonNotFound, StateCorrupt."""
        chosen = self.latest(id) if version is None else version
        data = None if chosen is None else self.files.read(name := f"{self._path(id)}/{chosen}.safetensors")
        if data is not None:
            return State.from_bytes(data, self.files.at(name))
        if there := self.versions(id):
            raise PersonNotFound(
                f"{id!r} has no version {chosen}; there are {', '.join(map(str, there))}",
                hint=f"Ask for the latest (version=None), or for one of these, for example version={there[-1]}.",
            )
        where = f"in the store {self.files.root}"
        raise PersonNotFound(f"no state of {id!r} {where}", hint="Personalize first:  mta personalize")

    def rollback(self, id: str, version: int) -> int:
        """Make an earlier version's content the newest again and return its number.

        Versions never change, so it is saved as one more; where the latest is that version, or of the same work,
        nothing happens. Raises PersonNotFound (naming the versions there are), StateCorrupt, StoreConflict.
        """
        since = self.tombstones.of(id)
        return self.save(id, self.load(id, version), since)

    def seal(self, id: str, version: int) -> str | None:
        """What tells a version's content from any other's, read from its file's beginning; None where it is not there.

        A number alone does not: who was forgotten and comes again begins with 1 once more.
        """
        beginning = self.files.read(f"{self._path(id)}/{version}.safetensors", SEALED)
        return None if beginning is None else seal_of(beginning) or ""

    def latest(self, id: str) -> int | None:
        """Number of the newest version, or None: from the hint upwards, from a listing where the hint does not hold."""
        path = self._path(id)
        version = self._hinted(path)
        if version is None:
            return max(self.versions(id), default=None)
        while self.files.exists(f"{path}/{version + 1}.safetensors"):
            version += 1
        return version

    def versions(self, id: str) -> list[int]:
        """Numbers of all versions there are, oldest first."""
        return list(self.sizes(id))

    def sizes(self, id: str) -> dict[int, int]:
        """Bytes of each version there is, oldest first."""
        found = self.files.sizes(self._path(id)).items()
        return dict(sorted((version_of(name), size) for name, size in found if version_of(name)))

    def time_of(self, id: str, version: int) -> str | None:
        """When a version was saved, as ISO 8601; None where the hint, which knows the newest alone, says nothing."""
        hint = self._hint(self._path(id))
        return str(hint["time"]) if hint.get("version") == version and "time" in hint else None

    def __contains__(self, id: str) -> bool:
        return self.latest(id) is not None

    def count(self) -> int:
        """Number of people with a state; lists the whole store."""
        found = (name.rpartition("/") for name in self.files.find() if _PERSON.match(name))
        return len({folder for folder, _, file in found if version_of(file)})

    def nbytes(self, id: str) -> int:
        """Bytes kept of a person: all versions, history, hint, exports."""
        return sum(self.files.sizes(self._path(id)).values())

    def save_history(self, person: Person, since: Collection[str] | None = None) -> None:
        """Keep a person's items and queries, in place of those kept before: opt-in, and forgotten with the person.

        ``since`` is as in ``save``. Raises PersonForgotten.
        """
        self.tombstones.check(person.id, since)
        try:
            self.files.replace(f"{self._path(person.id, write=True)}/history.json", history_to_bytes(person))
        finally:
            self._keep_out(person.id, since, "history.json")

    def history(self, id: str) -> Person | None:
        """What ``save_history`` kept, or None. Raises StateCorrupt."""
        data = self.files.read(name := f"{self._path(id)}/history.json")
        return None if data is None else history_from_bytes(id, data, self.files.at(name))

    def forget(self, id: str) -> bool:
        """Remove all that is kept of a person but exported adapters; False if there was nothing.

        Processes that still hold something of the person do not save it any more (``tombstones``). Whoever finds the
        first note and reads what is not removed yet finds the second one later.
        """
        found = False
        for _ in range(2):
            self.tombstones.add(id)
            found |= self.remove(id)
            self.files.remove(f"{self._path(id)}/exports.json")
            remove_if_empty(self.files, self._path(id))
        return found

    def remove(self, id: str) -> bool:
        """Remove a person's states, hint and history; False if there were none. Repeat it if it was interrupted.

        The hint goes first, the most telling text next, then states from the oldest on; each removal is flushed before
        the next one. What a crash leaves is still found under the id, as the newest state, and can be forgotten again.
        With the hint last, a crash could leave files of a person who seems unknown. ``Exports.forget`` comes before.
        """
        path = self._path(id)
        names = [name for name in self.files.sizes(path) if name != "exports.json"]
        for name in sorted(names, key=lambda name: (name != "latest.json", version_of(name), name)):
            self.files.remove(f"{path}/{name}")
        remove_if_empty(self.files, path)
        return bool(names)

    def _keep_out(self, id: str, since: Collection[str] | None, *names: str) -> None:
        """Remove files that were just written if the person was forgotten meanwhile, and raise PersonForgotten.

        Forgetting leaves its tombstone before it lists files. So either it finds these, or the tombstone is found here.
        Where nothing can be looked up (StoreError), a new state goes too; a history, which replaced another, stays.
        """
        try:
            self.tombstones.check(id, since)
        except StoreError as error:
            for name in names if isinstance(error, PersonForgotten) else filter(version_of, names):
                self.files.remove(f"{self._path(id)}/{name}")
            remove_if_empty(self.files, self._path(id))
            raise

    def _path(self, id: str, write: bool = False) -> str:
        if not isinstance(id, str) or not id:
            raise InputError(f"a person's id is {id!r}, expected a non-empty text", hint="Give every person an id.")
        self._key = self._key or self._open(write)
        keyed = hmac.new(self._key, id.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
        return f"{keyed[:2]}/{keyed}"

    def _secret(self, id: str, purpose: bytes = b"exports/") -> bytes:
        """The key of a person's exports; made of another key than their path, which everybody sees."""
        self._path(id)  # whoever comes first opens the store
        own = hashlib.sha256(purpose + self._key).digest()
        return hmac.new(own, id.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()

    def _buried(self, id: str) -> str:
        """The names of a person's tombstones; empty for a store without writes."""
        hashed = self._secret(id, b"forgotten/").hex()
        return hashed if self._key else ""

    def _open(self, write: bool) -> bytes:
        """The key; where nobody has written yet, a new one, or for readers none: any finds nobody."""
        data = self.files.read("store.json")
        if data is None and any(map(_PERSON.match, self.files.find(depth=3))):
            data = self.files.read("store.json") or b"nothing"  # again: a first writer may be at work right now
        if data is None and write:
            made = {"schema": SCHEMA, "key": secrets.token_hex(32)}
            with contextlib.suppress(FileExistsError):
                self.files.create("store.json", json.dumps(made).encode())
            data = self.files.read("store.json")  # whichever writer won
        if data is None:
            return b""
        try:
            value = json.loads(data)
            if value["schema"] != SCHEMA or not _KEY.fullmatch(value["key"]):
                raise ValueError(f"schema {value['schema']!r}")
            return bytes.fromhex(value["key"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreError(
                f"{self.files.at('store.json')} is damaged or missing: expected schema {SCHEMA} and a 64-digit key",
                hint="Restore it from a backup: without its key nobody in the store can be found.",
            ) from error

    def _hint(self, path: str) -> dict[str, Any]:
        """What the hint says; nothing where it is lost or damaged."""
        try:
            hint = json.loads(self.files.read(f"{path}/latest.json") or b"{}")
        except (ValueError, RecursionError):
            return {}
        return hint if isinstance(hint, dict) else {}

    def _hinted(self, path: str) -> int | None:
        version = self._hint(path).get("version")
        return version if type(version) is int and self.files.exists(f"{path}/{version}.safetensors") else None

    def _work(self, name: str) -> str | None:
        """The work key of a state; None if it cannot be read, so that a damaged one is made anew."""
        try:
            return State.from_bytes(self.files.read(name) or b"").work
        except StateCorrupt:
            return None


def version_of(name: str) -> int:
    """The version that a file's name stands for; 0 for other files."""
    return int(match[1]) if (match := _VERSION.fullmatch(name)) else 0
