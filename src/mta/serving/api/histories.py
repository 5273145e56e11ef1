"""Items of people before personalization: stored if the caller opted in, otherwise held in memory only."""

from __future__ import annotations

import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence

from mta.data.history import Item, Person
from mta.data.readers.rows import DATES_FROM
from mta.data.sharing import missing_from
from mta.serving.api.auth import LOCAL, Key
from mta.serving.engine import Refused
from mta.store import Store

ROOM = 1 << 28  # bytes of items in memory
_PERSON, _ITEM, _TEXT = 320, 360, 16  # bytes besides the texts' own objects; tests/serving/test_histories.py measures


class Histories:
    """People's items. Items without opt-in take at most ``room`` bytes of memory; the oldest people go first.

    A person or prefix key fills at most a quarter of ``room``, all such keys together three quarters; beyond that the
    key that uses most gives way. The rest is reserved for the operator.

    Another process may forget a person. So items are held together with the tombstones that existed when they arrived;
    items older than a tombstone are dropped and never used.
    """

    def __init__(self, store: Store, limit: int, room: int = ROOM) -> None:
        self._store, self._limit, self._room = store, limit, room
        self._held: dict[str, OrderedDict[str, Person]] = {}  # by share; "" is the operator
        self._used: Counter[str] = Counter()
        self._share: dict[str, str] = {}
        self._since: dict[str, frozenset[str]] = {}
        self._lock = threading.Lock()

    def append(self, id: str, new: Sequence[Item], keep: bool, key: Key = LOCAL) -> int:
        """Add items; return how many are stored, or held in memory, now. Raises Refused for too many, PersonForgotten.

        The limit counts both, an item in both once. To a longer history, which a file brought, it adds as many again,
        but only in memory.
        """
        since = self._store.tombstones.of(id)
        if keep:
            beside = self._of(id, since)
            return len(self._store.change_history(id, lambda kept: self._joined(kept, id, new, beside), since).items)
        stored = self._store.history(id)
        more = len(stored.items) if stored and len(stored.items) > self._limit else 0
        person = self._joined(self._of(id, since), id, new, stored, more)
        if key.share and size_of(person) > self._room // 4:
            raise Refused(
                f"a history may have at most {self._room // 4} bytes in memory",
                hint='Send "keep": true, or fewer and shorter items.',
            )
        with self._lock:
            self._drop(id)
            share = self._share[id] = key.share
            self._held.setdefault(share, OrderedDict())[id] = person
            self._since[id] = since
            self._used[share] += size_of(person)
            self._make_room(id)
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

    def _make_room(self, id: str) -> None:
        """Drop the oldest people, but not ``id``, whose items have just arrived."""
        share = self._share[id]
        while share and self._used[share] > self._room // 4 and self._drop_oldest(share, id):
            pass
        while self._used.total() - self._used[""] > self._room * 3 // 4:
            by_use = sorted((name for name in self._used if name), key=self._used.__getitem__, reverse=True)
            if not any(self._drop_oldest(name, id) for name in by_use):
                break
        while self._used.total() > self._room and self._drop_oldest("", id):
            pass

    def _drop_oldest(self, share: str, but: str) -> bool:
        oldest = next((id for id in self._held.get(share, ()) if id != but), None)
        return oldest is not None and self._drop(oldest)

    def _drop(self, id: str) -> bool:
        share = self._share.pop(id, None)
        if share is None:
            return False
        del self._since[id]
        self._used[share] -= size_of(self._held[share].pop(id))
        return True

    def _of(self, id: str, known: frozenset[str]) -> Person | None:
        """Return the person's items in memory; drop them if older than one of the tombstones ``known``."""
        with self._lock:
            if not known <= self._since.get(id, known):
                self._drop(id)
            share = self._share.get(id)
            return None if share is None else self._held[share][id]

    def of(self, id: str, known: frozenset[str]) -> Person | None:
        """Return all items of a person, stored and in memory, or None. ``known`` are the person's tombstones."""
        kept, held = self._store.history(id), self._of(id, known)
        stored = kept.items if kept else ()
        items = (*stored, *missing_from(stored, held.items if held else ()))  # a file may have brought them, too
        return Person.of(id, items) if items else None

    def held(self, id: str) -> int:
        """Return the number of items that are only in memory."""
        with self._lock:
            share, since = self._share.get(id), self._since.get(id)
            items = self._held[share][id].items if share is not None else ()
        return len(items) if since is not None and self._store.tombstones.of(id) <= since else 0

    def drop_forgotten(self) -> None:
        """Drop items in memory that are older than a tombstone."""
        with self._lock:
            before = dict(self._since)
        for id, names in self._store.tombstones.of_each(before).items():
            with self._lock:  # items that came after the listing have tombstones of their own
                if self._since.get(id) is before[id] and not names <= before[id]:
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
