"""Tombstones: files in a store that tell processes with data of a person that the person was forgotten.

    forgotten/<keyed hash of the id>-<unix seconds>-<random>      an empty file, written once and never changed

A process remembers the names that it finds when it receives a person's items. A new name means that the person was
forgotten since, so nothing made from these items may be saved. The time only says when a tombstone may be removed. The
hash has its own key, so a tombstone cannot be matched with a person's folder; a reader of store.json can test a guessed
id.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass

from mta.errors import PersonForgotten
from mta.system.storage import Storage

FOLDER = "forgotten"
LIFETIME = 7 * 24 * 3600.0  # seconds: no process holds items, and no stopped run is resumed, after this time
_NAME = re.compile(r"[0-9a-f]{64}-[0-9]{1,12}-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Tombstones:
    """The tombstones of one store. ``keyed`` hashes an id; it returns "" for a missing store."""

    files: Storage
    keyed: Callable[[str], str]

    def add(self, id: str) -> None:
        """Add a tombstone for a person, whose name no process knows; remove those that the person had."""
        if keyed := self.keyed(id):
            before = self.of(id)
            with suppress(FileExistsError):  # an object store repeats a request whose answer was lost
                self.files.write(f"{FOLDER}/{keyed}-{int(time.time())}-{secrets.token_hex(8)}", b"", new=True)
            for name in before:
                self.files.remove(f"{FOLDER}/{name}")

    def remove_expired(self) -> None:
        """Remove the tombstones that no process needs any more."""
        for name in self.expired():
            self.files.remove(name)

    def expired(self) -> list[str]:
        """Return the paths of expired tombstones, by the times in their names and this host's clock."""
        oldest = time.time() - LIFETIME
        return [f"{FOLDER}/{name}" for name in self.names() if int(name.split("-")[1]) < oldest]

    def names(self) -> frozenset[str]:
        """Return the names of all tombstones, from one listing."""
        return frozenset(filter(_NAME.fullmatch, self.files.names(FOLDER)))

    def of(self, id: str) -> frozenset[str]:
        """Return the names of a person's tombstones."""
        if not (names := self.names()):
            return names
        own = f"{self.keyed(id)}-"
        return frozenset(name for name in names if name.startswith(own))

    def since(self, ids: Iterable[str], known: Collection[str]) -> set[str]:
        """Return the people among ``ids`` with tombstones that are not in ``known``, from one listing."""
        ids = list(ids)
        new = {name.partition("-")[0] for name in self.names().difference(known)}
        return {id for id in ids if self.keyed(id) in new} if new else set()


def forgotten_meanwhile() -> PersonForgotten:
    """Return the error for saving results of items that were received before their person was forgotten."""
    return PersonForgotten(
        "the person was forgotten meanwhile: nothing made from their earlier items is saved",
        hint="To add the person again, personalize from items that were received afterwards.",
    )
