"""Items of people before personalization: stored if the caller opted in, otherwise held in memory only."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mta.data.history import Item, Person
from mta.data.sharing import missing_from
from mta.serving.api.auth import LOCAL, Key
from mta.serving.api.limits import Shares
from mta.serving.engine import Refused
from mta.store import Session, Store

ROOM = 1 << 28  # bytes of items in memory
_PERSON, _ITEM, _TEXT = 580, 360, 16  # bytes besides the texts' own objects; tests/serving/test_histories.py measures


@dataclass(frozen=True, slots=True)
class _Held:
    """A person's items in memory, and the session in which the newest ones arrived."""

    person: Person
    share: str  # of the key that sent the newest items
    session: Session
    size: int


class Histories:
    """People's items. Items without opt-in take at most ``room`` bytes of memory, in ``Shares``.

    A key's new items push out its own oldest people; if all keys together have too much, those of the key that has
    most. Another process may forget a person: items that are older than a tombstone are dropped and never used.
    """

    def __init__(self, store: Store, limit: int, room: int = ROOM) -> None:
        self._store, self._limit, self._shares = store, limit, Shares(room)
        self._held: dict[str, _Held] = {}  # by person, the oldest first
        self._lock = threading.Lock()

    def append(self, id: str, new: Sequence[Item], keep: bool, key: Key = LOCAL) -> int:
        """Add items; return how many are stored, or held in memory, now. Raises Refused, PersonForgotten."""
        session = self._store.session(id)
        if keep:
            held = self._of(id)
            return len(session.change_history(id, lambda: self._joined(self._store.history(id), id, new, held)).items)
        person = self._joined(self._of(id), id, new, self._store.history(id))
        size, share = size_of(person), key.share
        if share and size > self._shares.each:
            raise Refused(
                f"a history may have at most {self._shares.each} bytes in memory",
                hint='Send "keep": true, or fewer and shorter items.',
            )
        with self._lock:
            self._drop(id)
            while (name := self._shares.giving_way(share, size)) is not None and self._drop_oldest(name):
                pass
            self._held[id] = _Held(person, share, session, size)
            self._shares.used[share] += size
        return len(person.items)

    def _joined(self, before: Person | None, id: str, new: Sequence[Item], elsewhere: Person | None) -> Person:
        """Return a person with new items; those ``elsewhere``, in memory or stored, count for the limit, too."""
        known = before or Person(id, ())
        person = Person.of(id, (*known.items, *new), known.queries)
        self.check_count(len(person.items) + len(missing_from(person.items, elsewhere.items if elsewhere else ())))
        return person

    def check_count(self, count: int) -> None:
        """Raise Refused for more items than a history may have."""
        if count > self._limit:
            raise Refused(
                f"a history may have at most {self._limit} items, this one would have {count}",
                hint="Send fewer items, or let a file bring them: mta personalize --update --keep-histories",
            )

    def _drop_oldest(self, share: str) -> bool:
        oldest = next((id for id, one in self._held.items() if one.share == share), None)
        return oldest is not None and self._drop(oldest)

    def _drop(self, id: str) -> bool:
        held = self._held.pop(id, None)
        if held:
            self._shares.used[held.share] -= held.size
        return held is not None

    def _of(self, id: str) -> Person | None:
        """Return the person's items in memory; drop them if the person was forgotten since."""
        held = self._held.get(id)
        if held and held.session.forgotten([id]):
            self._drop_same({id: held})
            return None
        return held.person if held else None

    def of(self, id: str) -> Person | None:
        """Return all items of a person, stored and in memory, or None."""
        kept, held = self._store.history(id), self._of(id)
        stored = kept.items if kept else ()
        items = (*stored, *missing_from(stored, held.items if held else ()))  # a file may have brought them, too
        return Person.of(id, items) if items else None

    def held(self, id: str) -> int:
        """Return the number of items that are only in memory."""
        person = self._of(id)
        return len(person.items) if person else 0

    def drop_forgotten(self) -> None:
        """Drop items in memory of people who were forgotten since."""
        with self._lock:
            before = dict(self._held)
        gone = Session.joint(held.session for held in before.values()).forgotten(before) if before else ()
        self._drop_same({id: before[id] for id in gone})

    def _drop_same(self, gone: Mapping[str, _Held]) -> None:
        """Drop these items, unless others took their place meanwhile."""
        with self._lock:
            for id, held in gone.items():
                if self._held.get(id) is held:
                    self._drop(id)

    def forget(self, id: str) -> bool:
        """Drop a person's items from memory; return whether there were any."""
        with self._lock:
            return self._drop(id)


def size_of(person: Person) -> int:
    """Return the approximate bytes that a person takes in memory; a character takes one, two, or four."""
    texts = [text for item in person.items for text in (*item.fields.values(), item.id) if text]
    return _PERSON + _ITEM * len(person.items) + sum(sys.getsizeof(text) + _TEXT for text in texts)
