"""What is known of people before they are personalized: kept in the store by opt-in, else held in memory alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from mta.errors import InputError
from mta.history import Item, Person
from mta.serving.auth import LOCAL, Key
from mta.store import Store

_BESIDE = 64  # what an object takes beside its text, about


class Histories:
    """People's items. Of those who did not opt in at most ``room`` characters are held: the oldest people are dropped.

    A prefix's key fills no more than a quarter of it, and what is dropped beyond that is of its own people.
    """

    def __init__(self, store: Store, most: int, room: int = 1 << 28) -> None:
        self._store, self._most, self._room = store, most, room
        self._held: OrderedDict[str, Person] = OrderedDict()
        self._sizes: dict[str, int] = {}

    def append(self, id: str, new: Sequence[Item], keep: bool, key: Key = LOCAL) -> int:
        """Add items and return how many there are. Raises InputError where they are too many."""
        before = self._store.history(id) if keep else self._held.get(id)
        person = Person.of(id, (*(before.items if before else ()), *new))
        if len(person.items) > self._most:
            raise InputError(f"a history has at most {self._most} items here, these would be {len(person.items)}")
        if keep:
            self._store.save_history(person)
        else:
            self._held[id], self._sizes[id] = person, _characters(person)
            if key.rights == "prefix":
                self._drop([one for one in self._held if key.owns(one)], self._room // 4)
            self._drop([*self._held], self._room)
        return len(person.items)

    def _drop(self, people: Sequence[str], room: int) -> None:
        """Of these people, oldest first, as many as it takes; the last of them stays."""
        taken = sum(self._sizes[id] for id in people)
        for id in people[:-1]:
            if taken <= room:
                return
            taken -= self._sizes[id]
            self.forget(id)

    def of(self, id: str) -> Person | None:
        """All items of a person, kept and held, or None."""
        kept, held = self._store.history(id), self._held.get(id)
        items = (*(kept.items if kept else ()), *(held.items if held else ()))
        return Person.of(id, items) if items else None

    def held(self, id: str) -> int:
        """How many items are in memory alone."""
        return len(self._held[id].items) if id in self._held else 0

    def forget(self, id: str) -> bool:
        """Drop what is held; whether there was anything."""
        self._sizes.pop(id, None)
        return self._held.pop(id, None) is not None


def _characters(person: Person) -> int:
    return sum(len(text) + _BESIDE for item in person.items for text in item.fields.values())
