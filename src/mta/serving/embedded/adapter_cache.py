"""People whose adapters are at hand: made from bank and store when first asked for, dropped when long unused."""

from __future__ import annotations

import threading
from collections import OrderedDict

from mta.personalize.adapters import Nobody
from mta.serving.embedded.adapter_slots import Person, Seats
from mta.serving.engine import Version, Who
from mta.store import Store


class Activated:
    """At most ``count`` people, the least recently used go first; merges are computed again, never stored."""

    def __init__(self, seats: Seats, store: Store, count: int = 64) -> None:
        self._seats, self._store, self._count = seats, store, count
        self._people: OrderedDict[Who, Person] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = self.misses = 0
        self.forgotten = 0  # how often somebody was

    def __len__(self) -> int:
        return len(self._people)

    def get(self, who: Who) -> Person:
        """A person's part of a row. Raises PersonNotFound, StateCorrupt, OtherBank."""
        with self._lock:
            if who in self._people:
                self._people.move_to_end(who)
                self.hits += 1
                return self._people[who]
            self.misses += 1
            before = self.forgotten
        made = self._made(who)  # not under the lock: a store may be far away
        with self._lock:
            if before == self.forgotten:  # else it may be somebody who was forgotten meanwhile
                self._people[who] = made
                while len(self._people) > self._count:
                    self._people.popitem(last=False)
        return made

    def known(self) -> list[Who]:
        """The people with adapters in the cache."""
        with self._lock:
            return list(self._people)

    def forget(self, person: str) -> None:
        """Drop all versions of a person."""
        with self._lock:
            self.forgotten += 1
            for who in [who for who in self._people if isinstance(who, Version) and who.person == person]:
                del self._people[who]

    def _made(self, who: Who) -> Person:
        if isinstance(who, Nobody):
            return self._seats.person(who)
        return self._seats.person(self._store.load(who.person, who.number), who.stacked)
