"""People and what they wrote, rated or tagged: frozen values in time order.

An ``Item`` holds the fields of its task ({"text": ..., "score": ...}); what of them becomes the prompt
and what the target is the task's business (``mta.data.tasks``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from mta.errors import InputError


@dataclass(frozen=True, slots=True)
class Item:
    """One thing a person did: the fields of a task, and when (any sortable number; None = unknown).

    ``is_query`` marks a benchmark's own question, which may be worded unlike the history (LaMP-1, LaMP-7).
    """

    fields: Mapping[str, str] = field(hash=False)
    time: float | None = None
    id: str | None = None
    is_query: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", MappingProxyType(dict(self.fields)))

    def __reduce__(self) -> tuple[type[Item], tuple[dict[str, str], float | None, str | None, bool]]:
        return Item, (dict(self.fields), self.time, self.id, self.is_query)


@dataclass(frozen=True, slots=True)
class Person:
    """A person's history, oldest item first, and the benchmark's own queries where there are any.

    ``group`` names the people who are connected by copies of items; it is empty for a person who shares no item.
    """

    id: str
    items: tuple[Item, ...]
    queries: tuple[Item, ...] = ()
    group: str = ""

    @classmethod
    def of(cls, id: str, items: Iterable[Item], queries: Iterable[Item] = ()) -> Person:
        """A person with items sorted by time; items without a time keep their order and come first."""
        timed = sorted(items, key=lambda item: (item.time is not None, item.time or 0.0))
        return cls(id, tuple(timed), tuple(queries))

    def first(self, m: int) -> Person:
        """The same person with only the first ``m`` items: the few *shots*."""
        return replace(self, items=self.items[:m])

    def latest(self, n: int) -> Person:
        """The same person with only the ``n`` most recent items."""
        return replace(self, items=self.items[-n:] if n else ())

    def after(self, shots: int, n: int) -> tuple[Item, ...]:
        """The ``n`` items that follow the first ``shots``: what comes next, to be asked as queries."""
        if len(self.items) < shots + n:
            raise InputError(
                f"a person has {len(self.items)} items; {shots} shots and {n} later queries were asked for",
                hint="Ask for fewer shots or queries, or leave this person out.",
            )
        return self.items[shots : shots + n]

    def digest(self) -> str:
        """Sha256 over the items in order: the same history gives the same digest in any process."""
        return hashlib.sha256(f"[{', '.join(map(_row, self.items))}]".encode()).hexdigest()

    def grown_from(self, digest: str) -> int:
        """How many of the first items had that digest together; 0 where none did: the past was changed as well."""
        so_far = hashlib.sha256(b"[")
        for count, item in enumerate(self.items, 1):
            so_far.update((", " * (count > 1) + _row(item)).encode())
            whole = so_far.copy()
            whole.update(b"]")
            if whole.hexdigest() == digest:
                return count
        return 0


def _row(item: Item) -> str:
    return json.dumps([sorted(item.fields.items()), item.time], ensure_ascii=False)


class People(list[Person]):
    """People read together, and the task they were read for."""

    def __init__(self, people: Iterable[Person], task: object) -> None:
        super().__init__(people)
        self.task = task
