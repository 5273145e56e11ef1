"""Notes in a store that a person was forgotten, for processes that still hold something of that person.

    forgotten/<keyed hash of the id>-<unix seconds>-<random>      an empty file, written once and never changed

A process remembers the names it found when a person's items came in. A name that is new afterwards means that the
person was forgotten since, so what the process holds or made of these items must not be saved. No clocks are compared:
the times of a note only say when it may be removed. The hash is keyed by a key of its own, so a note cannot be
matched with a person's folder; a reader of store.json can test a guessed id.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from mta.errors import PersonForgotten
from mta.system.storage import Storage

FOLDER = "forgotten"
LIFETIME = 7 * 24 * 3600.0  # seconds: longer than any process holds items without looking here
NOTHING: frozenset[str] = frozenset()
_NAME = re.compile(r"([0-9a-f]{64})-([0-9]{1,12})-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Tombstones:
    """The notes of one store. ``keyed`` hashes an id; it returns "" in a store that does not exist yet."""

    files: Storage
    keyed: Callable[[str], str]

    def add(self, id: str) -> None:
        """Note that a person is being forgotten now, and remove notes that are too old to matter."""
        if keyed := self.keyed(id):
            self.files.create(f"{FOLDER}/{keyed}-{int(time.time())}-{secrets.token_hex(8)}", b"")
            for name in self.expired():
                self.files.remove(name)

    def expired(self, dry: bool = False) -> list[str]:
        """The paths of the notes that are too old to matter.

        This host's clock may be wrong. So a note's file, too, must be that much older than a file that is written now:
        the store gives both their times. ``dry`` writes none and goes by the times in the names alone.
        """
        old = [f"{FOLDER}/{name}" for name in self.names() if _is_expired(name)]
        if dry or not old:
            return old
        now = f"{FOLDER}/.now.{secrets.token_hex(16)}"
        try:
            self.files.replace(now, b"")
            youngest = self.files.age(now)
            return [name for name in old if self.files.age(name) - youngest > LIFETIME]
        finally:
            self.files.remove(now)

    def names(self) -> frozenset[str]:
        """The names of all notes: one listing."""
        return frozenset(filter(_NAME.fullmatch, self.files.sizes(FOLDER)))

    def of(self, id: str) -> frozenset[str]:
        """The names of one person's notes."""
        return self.among(self.names(), id)

    def among(self, names: Iterable[str], id: str) -> frozenset[str]:
        """Those of ``names`` that are one person's."""
        if not names:
            return NOTHING
        keyed = self.keyed(id)
        return frozenset(name for name in names if name.startswith(f"{keyed}-"))

    def since(self, ids: Iterable[str], known: Collection[str]) -> set[str]:
        """The people among ``ids`` who were forgotten since the notes ``known`` were all there were."""
        new = {name.partition("-")[0] for name in self.names().difference(known)}
        return {id for id in ids if self.keyed(id) in new} if new else set()

    def check(self, id: str, known: Collection[str] | None) -> None:
        """Raise PersonForgotten if a person was forgotten since ``known`` was found; None checks nothing."""
        if known is not None and self.since([id], known):
            raise forgotten_meanwhile()


def forgotten_meanwhile() -> PersonForgotten:
    """The error for what was made of items that came in before their person was forgotten."""
    return PersonForgotten(
        "the person was forgotten meanwhile: nothing that was made of their earlier items is saved",
        hint="Personalize again from items that came in after that, if the person is to be known again.",
    )


def _is_expired(name: str) -> bool:
    """Whether a note is too old to matter, by this host's clock and the time in its name."""
    found = _NAME.fullmatch(name)
    return found is not None and time.time() - int(found[2]) > LIFETIME
