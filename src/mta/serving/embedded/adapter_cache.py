"""LRU cache of materialized adapters."""

from __future__ import annotations

import threading
from collections import OrderedDict

from mta.personalize.adapters import Nobody
from mta.serving.embedded.adapter_slots import AdapterSlots, RowAdapter
from mta.serving.engine import Version, Who
from mta.store import Store


class AdapterCache:
    """Caches at most ``count`` people's adapters, built from bank and store on first use. Merges are never stored."""

    def __init__(self, slots: AdapterSlots, store: Store, count: int = 64) -> None:
        self._slots, self._store, self._count = slots, store, count
        self._adapters: OrderedDict[Who, RowAdapter] = OrderedDict()
        self._lock = threading.Lock()
        self.hits = self.misses = 0
        self.forgotten = 0  # number of calls of forget()

    def __len__(self) -> int:
        return len(self._adapters)

    def get(self, who: Who) -> RowAdapter:
        """Return the adapter of a row. Raises PersonNotFound, StateCorrupt, OtherBank."""
        with self._lock:
            if who in self._adapters:
                self._adapters.move_to_end(who)
                self.hits += 1
                return self._adapters[who]
            self.misses += 1
            before = self.forgotten
        adapter = self._load(who)  # without the lock: the store may be slow
        with self._lock:
            if before == self.forgotten:  # else this person may have been forgotten meanwhile
                self._adapters[who] = adapter
                while len(self._adapters) > self._count:
                    self._adapters.popitem(last=False)
        return adapter

    def known(self) -> list[Who]:
        """Return the owners of the cached adapters."""
        with self._lock:
            return list(self._adapters)

    def forget(self, person: str) -> None:
        """Drop all versions of a person."""
        with self._lock:
            self.forgotten += 1
            for who in [who for who in self._adapters if isinstance(who, Version) and who.person == person]:
                del self._adapters[who]

    def _load(self, who: Who) -> RowAdapter:
        if isinstance(who, Nobody):
            return self._slots.adapter_of(who)
        return self._slots.adapter_of(self._store.load(who.person, who.number), who.stacked)
