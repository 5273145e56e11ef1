"""Which of a person's items are the shots, and which later ones the queries. Source: docs/decisions/005."""

from __future__ import annotations

from typing import Literal

from mta.data.history import Item, Person
from mta.data.tasks.task import Task
from mta.errors import InputError

QueryOrder = Literal["next", "last"]


def shots_and_queries(
    task: Task, person: Person, shots: int, queries: int, ask: QueryOrder
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Split a person into shots and queries. Raises InputError for too few items.

    ``next``: the first items are the shots. The queries are the benchmark's own if there are any, else the items right
    after the shots.
    ``last``: the queries are the last items in time, the benchmark's own among them, whatever the number of shots. The
    shots are the items right before them.
    Where queries differ from history items (LaMP-1, LaMP-7), only the benchmark's own queries are asked.
    """
    if not has_enough_items(task, person, shots, queries, ask):
        asked = f" and {len(person.queries)} of the benchmark's queries" if person.queries else ""
        raise InputError(
            f"a person has {len(person.items)} items{asked}; {shots} shots and {queries} queries were asked for",
            hint=f"Lower shots= or queries=, or leave out people with fewer than {shots + queries} items.",
        )
    own = tuple(query for query in person.queries if task.has_target(query))
    if ask == "next":
        return person.items[:shots], own[-queries:] or person.items[shots : shots + queries]
    if not task.asks_as_items:
        return person.items[-shots:], own[-queries:]
    timeline = (*person.items, *own)
    return timeline[-queries - shots : -queries], timeline[-queries:]


def has_enough_items(task: Task, person: Person, shots: int, queries: int, ask: QueryOrder) -> bool:
    """Return whether a person has as many shots and queries as the protocol needs."""
    own = sum(task.has_target(query) for query in person.queries)
    if not task.asks_as_items:
        return len(person.items) >= shots and own > 0
    if ask == "next":
        return len(person.items) >= shots + (0 if own else queries)
    return len(person.items) + own >= shots + queries
