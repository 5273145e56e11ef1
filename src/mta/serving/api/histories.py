"""What is known of people before they are personalized: kept in the store by opt-in, else held in memory alone."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence

from mta.data.history import Item, Person
from mta.serving.api.auth import LOCAL, Key
from mta.serving.engine import Refused
from mta.store import Store
from mta.store.lock import locked

_BESIDE = 64  # what an object takes beside its text, about


class Histories:
    """People's items. Of those who did not opt in at most ``room`` characters are held: the oldest people are dropped.

    A person's or prefix's key fills a quarter of it at most, all of these together three quarters; beyond that whoever
    fills most gives way. What is left is the operator's.

    Another process may forget a person. So with held items the person's tombstones are remembered that were there when
    the items came in; items that are older than a tombstone are dropped, never used.
    """

    def __init__(self, store: Store, most: int, room: int = 1 << 28) -> None:
        self._store, self._most, self._room = store, most, room
        self._held: dict[str, OrderedDict[str, Person]] = {}  # by whose key: "" is the operator's
        self._filled: Counter[str] = Counter()
        self._whose: dict[str, str] = {}
        self._since: dict[str, frozenset[str]] = {}
        self._door = threading.Lock()

    def append(self, id: str, new: Sequence[Item], keep: bool, key: Key = LOCAL) -> int:
        """Add items and return how many there are. Raises Refused where they are too many, PersonForgotten."""
        if keep:
            self._store.identity(write=True)  # the lock lies in the store
            with locked(self._store.files):
                since = self._store.tombstones.of(id)
                person = self._joined(self._store.history(id), id, new)
                self._store.save_history(person, since)
                return len(person.items)
        since = self._store.tombstones.of(id)
        person = self._joined(self._of(id, since), id, new)
        with self._door:
            self._drop(id)
            whose = self._whose[id] = key.share
            self._held.setdefault(whose, OrderedDict())[id] = person
            self._since[id] = since
            self._filled[whose] += _characters(person)
            self._make_room(whose)
        return len(person.items)

    def _joined(self, before: Person | None, id: str, new: Sequence[Item]) -> Person:
        person = Person.of(id, (*(before.items if before else ()), *new))
        if len(person.items) > self._most:
            raise Refused(
                f"a history has at most {self._most} items here, these would be {len(person.items)}",
                hint="Send fewer, or forget the person and begin anew: DELETE /v1/people/…",
            )
        return person

    def _make_room(self, whose: str) -> None:
        while whose and self._filled[whose] > self._room // 4 and self._drop_oldest(whose):
            pass
        while (others := self._filled.total() - self._filled[""]) > self._room * 3 // 4:
            most = max((name for name in self._filled if name), key=self._filled.__getitem__)
            if not self._drop_oldest(most):
                break
        while others + self._filled[""] > self._room and self._drop_oldest(""):
            pass

    def _drop_oldest(self, whose: str) -> bool:
        """Of this key's people; the last of them stays."""
        held = self._held.get(whose, OrderedDict())
        return len(held) > 1 and self._drop(next(iter(held)))

    def _drop(self, id: str) -> bool:
        whose = self._whose.pop(id, None)
        if whose is None:
            return False
        del self._since[id]
        self._filled[whose] -= _characters(self._held[whose].pop(id))
        return True

    def _of(self, id: str, known: frozenset[str]) -> Person | None:
        """The held items of a person with the tombstones ``known``; items older than a tombstone are dropped."""
        with self._door:
            if not known <= self._since.get(id, known):
                self._drop(id)
            whose = self._whose.get(id)
            return None if whose is None else self._held[whose][id]

    def of(self, id: str, known: frozenset[str]) -> Person | None:
        """All items of a person with the tombstones ``known``, kept and held, or None."""
        kept, held = self._store.history(id), self._of(id, known)
        items = (*(kept.items if kept else ()), *(held.items if held else ()))
        return Person.of(id, items) if items else None

    def held(self, id: str) -> int:
        """How many items are in memory alone."""
        found = self._of(id, self._store.tombstones.of(id))
        return len(found.items) if found else 0

    def drop_forgotten(self, names: Collection[str]) -> None:
        """Drop the items held of people that tombstones of these ``names`` are newer than."""
        for id in list(self._since):
            self._of(id, self._store.tombstones.among(names, id))

    def forget(self, id: str) -> bool:
        """Drop what is held; whether there was anything."""
        with self._door:
            return self._drop(id)


def _characters(person: Person) -> int:
    return sum(len(text) + _BESIDE for item in person.items for text in item.fields.values())
