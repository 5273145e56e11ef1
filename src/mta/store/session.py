"""A session: nothing is saved for people who were forgotten after it began.

Begin it before people's items are read. What is computed from these items may take hours, and a person may be forgotten
meanwhile, by any process: then nothing made from their items is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mta.data.history import Person
from mta.store.state import State
from mta.store.tombstones import forgotten_meanwhile

if TYPE_CHECKING:
    from mta.store.store import Store


@dataclass(frozen=True, slots=True)
class Session:
    """Saves to ``store``. ``known`` are the tombstones that existed when it began (``Store.session``)."""

    store: Store
    known: frozenset[str]

    def forgotten(self, ids: Iterable[str]) -> set[str]:
        """Return the people among ``ids`` who were forgotten since the session began, from one listing."""
        return self.store.tombstones.since(ids, self.known)

    def check(self, id: str) -> None:
        """Raise PersonForgotten if a person was forgotten since the session began."""
        if self.forgotten([id]):
            raise forgotten_meanwhile()

    def save(self, id: str, state: State, after: int | None = None) -> int:
        """Save a state as the next version and return its number. See ``Store.save``."""
        return self.store.save(id, state, self.known, after)

    def save_history(self, person: Person) -> None:
        """Save a person's items and queries (opt-in). See ``Store.save_history``."""
        self.store.save_history(person, self.known)

    def change_history(self, id: str, change: Callable[[Person | None], Person]) -> Person:
        """Save and return what ``change`` makes of a history. See ``Store.change_history``."""
        return self.store.change_history(id, change, self.known)

    def exporting(self, id: str, folder: str | Path) -> AbstractContextManager[Callable[[Path], None]]:
        """Record that a person's adapter is written to a folder within the block. See ``Exports.writing``."""
        return self.store.exports.writing(id, folder, self.known)
