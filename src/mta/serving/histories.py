"""What is known of people before they are personalized: kept in the store by opt-in, else held in memory alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from mta.errors import InputError
from mta.history import Item, Person
from mta.store import Store


class Histories:
    """People's items; at most ``held`` people who did not opt in are remembered, the oldest are dropped."""

    def __init__(self, store: Store, most: int, held: int = 1024) -> None:
        self._store, self._most, self._size = store, most, held
        self._held: OrderedDict[str, Person] = OrderedDict()

    def append(self, id: str, new: Sequence[Item], keep: bool) -> int:
        """Add items and return how many there are. Raises InputError where they are too many."""
        before = self._store.history(id) if keep else self._held.get(id)
        person = Person.of(id, (*(before.items if before else ()), *new))
        if len(person.items) > self._most:
            raise InputError(f"a history has at most {self._most} items here, these would be {len(person.items)}")
        if keep:
            self._store.save_history(person)
        else:
            self._held[id] = person
            while len(self._held) > self._size:
                self._held.popitem(last=False)
        return len(person.items)

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
        return self._held.pop(id, None) is not None
