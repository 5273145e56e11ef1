"""Items of people before personalization: stored if the caller opted in, otherwise held in memory only."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from mta.data.history import Item, Person
from mta.data.readers.rows import DATES_FROM
from mta.data.sharing import missing_from
from mta.serving.api.auth import LOCAL, Key
from mta.serving.api.limits import Shares
from mta.serving.engine import Refused
from mta.store import Session, Store

ROOM = 1 << 28  # bytes of items in memory
_PERSON, _ITEM, _TEXT = 320, 360, 16  # bytes besides the texts' own objects; tests/serving/test_histories.py measures


@dataclass(frozen=True, slots=True)
class _Held:
    """A person's items in memory, and the person's tombstones from when they arrived."""

    person: Person
    share: str  # of the key that sent the newest items
    since: frozenset[str]
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
        """Add items; return how many are stored, or held in memory, now. Raises Refused for too many, PersonForgotten.

        The limit counts both, an item in both once. To a longer history, which a file brought, it adds as many again,
        but only in memory.
        """
        since = self._store.tombstones.of(id)
        if keep:
            beside = self._of(id, since)
            session = Session(self._store, since)
            return len(session.change_history(id, lambda: self._joined(self._store.history(id), id, new, beside)).items)
        stored = self._store.history(id)
        more = len(stored.items) if stored and len(stored.items) > self._limit else 0
        person = self._joined(self._of(id, since), id, new, stored, more)
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
            self._held[id] = _Held(person, share, since, size)
            self._shares.add(share, size)
        return len(person.items)

    def _joined(
        self, before: Person | None, id: str, new: Sequence[Item], beside: Person | None, more: int = 0
    ) -> Person:
        known = before or Person(id, ())
        _check_times([*known.items, *(beside.items if beside else ())], new)
        person = Person.of(id, (*known.items, *new), known.queries)
        others = missing_from(person.items, beside.items) if beside else ()
        self.check_count(len(person.items) + len(others), more)
        return person

    def check_count(self, count: int, more: int = 0) -> None:
        """Raise Refused for more items than a history may have, and ``more``."""
        if count > self._limit + more:
            raise Refused(
                f"a history may have at most {self._limit + more} items, this one would have {count}",
                hint="Send fewer items, or let a file bring them: mta personalize --update --keep-histories",
            )

    def _drop_oldest(self, share: str) -> bool:
        oldest = next((id for id, one in self._held.items() if one.share == share), None)
        return oldest is not None and self._drop(oldest)

    def _drop(self, id: str) -> bool:
        held = self._held.pop(id, None)
        if held:
            self._shares.remove(held.share, held.size)
        return held is not None

    def _of(self, id: str, known: frozenset[str]) -> Person | None:
        """Return the person's items in memory; drop them if older than one of the tombstones ``known``."""
        with self._lock:
            held = self._held.get(id)
            if held and not known <= held.since:
                self._drop(id)
                return None
            return held.person if held else None

    def of(self, id: str, known: frozenset[str]) -> Person | None:
        """Return all items of a person, stored and in memory, or None. ``known`` are the person's tombstones."""
        kept, held = self._store.history(id), self._of(id, known)
        stored = kept.items if kept else ()
        items = (*stored, *missing_from(stored, held.items if held else ()))  # a file may have brought them, too
        return Person.of(id, items) if items else None

    def held(self, id: str) -> int:
        """Return the number of items that are only in memory."""
        held = self._held.get(id)
        return len(held.person.items) if held and self._store.tombstones.of(id) <= held.since else 0

    def drop_forgotten(self) -> None:
        """Drop items in memory that are older than a tombstone."""
        with self._lock:
            before = dict(self._held)
        for id, names in self._store.tombstones.of_each(before).items():
            with self._lock:  # items that came after the listing have tombstones of their own
                if self._held.get(id) is before[id] and not names <= before[id].since:
                    self._drop(id)

    def forget(self, id: str) -> bool:
        """Drop a person's items from memory; return whether there were any."""
        with self._lock:
            return self._drop(id)


def _check_times(known: Sequence[Item], new: Sequence[Item]) -> None:
    """Raise Refused for a new item with a small number as its time, where other items have dates."""
    dated = any((item.time or 0) >= DATES_FROM for item in (*known, *new))
    if dated and (small := [item.time for item in new if item.time is not None and abs(item.time) < DATES_FROM]):
        raise Refused(
            f"an item's time is {small[0]:g}, and other items of this person have dates",
            hint="Give seconds since 1970, or leave the time out: the item then follows all known ones.",
        )


def size_of(person: Person) -> int:
    """Return the approximate bytes that a person takes in memory; a character takes one, two, or four."""
    texts = [text for item in person.items for text in (*item.fields.values(), item.id) if text]
    return _PERSON + _ITEM * len(person.items) + sum(sys.getsizeof(text) + _TEXT for text in texts)
