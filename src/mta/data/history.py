"""People and what they wrote, rated, or tagged: frozen values in time order.

An ``Item`` holds the fields of its task ({"text": ..., "score": ...}). The task (``mta.data.tasks``) decides which
fields make the prompt and which field is the target.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from itertools import accumulate
from numbers import Real
from types import MappingProxyType
from typing import Any

from mta.errors import InputError

PROFILE = "profile"  # field of a text in front of an item's prompt, such as earlier items of the person


@dataclass(frozen=True, slots=True)
class Item:
    """One input with the person's output, as fields of the task, and a time (a number; None if unknown).

    ``is_query`` marks a benchmark's own question, which may be worded differently from the history (LaMP-1, LaMP-7).
    """

    fields: Mapping[str, str] = field(hash=False)
    time: float | None = None
    id: str | None = None
    is_query: bool = False

    def __post_init__(self) -> None:
        if self.time is not None:
            if not isinstance(self.time, Real | Decimal) or not math.isfinite(self.time):
                hint = "Give a number, such as seconds since 1970, or None for an unknown time."
                raise InputError(f"the time of an item is {self.time!r}", hint=hint)
            object.__setattr__(self, "time", float(self.time))  # equal items have equal digests, whatever the number
        if other := next((name for name, value in self.fields.items() if not isinstance(value, str)), None):
            kind = type(self.fields[other]).__name__
            raise InputError(f"field {other!r} of an item is a value of type {kind}", hint="Give every field as text.")
        object.__setattr__(self, "fields", MappingProxyType(dict(self.fields)))

    def __reduce__(self) -> tuple[type[Item], tuple[dict[str, str], float | None, str | None, bool]]:
        return Item, (dict(self.fields), self.time, self.id, self.is_query)


def own_fields(item: Item) -> list[tuple[str, str]]:
    """Return an item's fields in order, without the text in front of its prompt."""
    return sorted(pair for pair in item.fields.items() if pair[0] != PROFILE)


@dataclass(frozen=True)
class Person:
    """A person's history, oldest item first, and the benchmark's own queries, if any.

    People connected by copies of items have the same ``group``. A person who shares no item has an empty ``group``.
    """

    id: str
    items: tuple[Item, ...]
    queries: tuple[Item, ...] = ()
    group: str = ""

    @classmethod
    def of(cls, id: str, items: Iterable[Item], queries: Iterable[Item] = ()) -> Person:
        """Return a person with items sorted by time. An item without a time follows the newest item before it."""
        items = tuple(items)
        newest = accumulate((-math.inf if item.time is None else item.time for item in items), max)
        times = [time if item.time is None else item.time for item, time in zip(items, newest)]
        return cls(id, tuple(items[n] for n in sorted(range(len(items)), key=times.__getitem__)), tuple(queries))

    def first(self, m: int) -> Person:
        """Return the person with only the first ``m`` items: the *shots*."""
        return replace(self, items=self.items[:m])

    def latest(self, n: int) -> Person:
        """Return the person with only the ``n`` most recent items."""
        return replace(self, items=self.items[-n:] if n else ())

    def digest(self) -> str:
        """Return the sha256 of the items in order, without texts in front of prompts; equal in all processes."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(f"[{', '.join(map(_row, self.items))}]".encode()).hexdigest()

    def grown_from(self, digest: str) -> int:
        """Return n if the first n items have this digest, or 0 if earlier items were changed."""
        so_far = hashlib.sha256(b"[")
        for count, item in enumerate(self.items, 1):
            so_far.update((", " * (count > 1) + _row(item)).encode())
            whole = so_far.copy()
            whole.update(b"]")
            if whole.hexdigest() == digest:
                return count
        return 0


def _row(item: Item) -> str:
    return json.dumps([own_fields(item), item.time], ensure_ascii=False)


def check_distinct(people: Iterable[Person]) -> None:
    """Raise InputError if a person is given twice."""
    if twice := [id for id, count in Counter(person.id for person in people).items() if count > 1]:
        raise InputError(
            f"{len(twice)} people are given twice", hint="Put all items of a person into one history, and give it once."
        )


class People(list[Person]):
    """The people of one file or folder, and the task they were read for."""

    def __init__(self, people: Iterable[Person], task: object) -> None:
        super().__init__(people)
        self.task = task

    def __getitem__(self, place: Any, /) -> Any:
        """Return one person, or people of the same task: slices, unlike other lists made from people, keep the task."""
        chosen = super().__getitem__(place)
        return People(chosen, self.task) if isinstance(chosen, list) else chosen


def named_items(people: Iterable[Person], used: Container[int]) -> Iterator[tuple[str, Item]]:
    """Yield the items whose ``id()`` is in ``used``, each behind its number and person, for messages."""
    for person in people:
        for number, item in enumerate(person.items, 1):
            if id(item) in used:
                yield f"item {number} of {person.id!r}", item
