"""History in the prompt: a person's earlier items, with their answers, in front of a question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from mta.data.history import PROFILE, Item, Person
from mta.data.tasks.task import Task


def with_history(task: Task, person: Person, most: int) -> Person:
    """Return the person with up to ``most`` earlier items in every prompt, oldest first; 0 changes nothing.

    An item shows those since the start of its block of ``most`` + 1 items: so all lengths of histories are as frequent,
    and the items of a block share the beginning of their prompts, which a pass computes once. A query shows the latest
    items. Source: our choice.
    """
    items = person.items
    shown = tuple(after(task, item, items[n - n % (most + 1) : n]) for n, item in enumerate(items))
    latest = items[-most:] if most else ()
    return replace(person, items=shown, queries=tuple(after(task, query, latest) for query in person.queries))


def after(task: Task, item: Item, earlier: Sequence[Item]) -> Item:
    """Return an item whose prompt begins with ``earlier`` ones; without any, the item itself."""
    return replace(item, fields={**item.fields, PROFILE: in_words(task, earlier)}) if earlier else item


def in_words(task: Task, earlier: Sequence[Item]) -> str:
    """Return the beginning of a prompt that shows ``earlier`` items; empty without any."""
    said = "; ".join(task.sentence(one).replace("; ", ", ") for one in earlier)  # "; " separates items
    return f"Earlier answers of this person: {said}. " if earlier else ""


class Shown(NamedTuple):
    """Items as prompts show them, and the number of each item's block (``with_history``)."""

    items: list[Item]
    blocks: list[int]


def as_shown(task: Task, people: Iterable[Person], items: Iterable[Item], most: int) -> Shown:
    """Return some ``items`` of ``people``, as they are in ``with_history``."""
    shown = {
        id(item): (later, (number, place // (most + 1)))
        for number, person in enumerate(people)
        for place, (item, later) in enumerate(zip(person.items, with_history(task, person, most).items))
    }
    found = [shown[id(item)] for item in items]
    numbers = {block: n for n, block in enumerate(dict.fromkeys(block for _, block in found))}
    return Shown([item for item, _ in found], [numbers[block] for _, block in found])
