"""History in the prompt: a person's earlier items, with their answers, in front of a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mta.data.history import Item, Person
from mta.data.tasks.task import PROFILE, Task


def with_history(task: Task, person: Person, most: int) -> Person:
    """Return the person for ``task.profiled()``: every item and query shows up to ``most`` earlier items, oldest first.

    An item shows those since the start of its block of ``most`` + 1 items: so all lengths of histories are as frequent,
    and the items of a block share the beginning of their prompts, which a pass computes once. A query shows the latest
    items. Source: our choice.
    """
    items = person.items
    shown = tuple(_with_profile(task, item, items[n - n % (most + 1) : n]) for n, item in enumerate(items))
    latest = items[-most:] if most else ()
    return replace(person, items=shown, queries=tuple(_with_profile(task, query, latest) for query in person.queries))


def _with_profile(task: Task, item: Item, earlier: Sequence[Item]) -> Item:
    """Return an item with ``earlier`` ones in its field ``profile``."""
    said = "; ".join(task.sentence(one) for one in earlier)
    profile = f"Earlier answers of this person: {said}. " if earlier else ""
    return replace(item, fields={**item.fields, PROFILE: profile})
