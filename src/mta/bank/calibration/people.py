"""The people whom a bank is calibrated on: as newcomers, on items that nothing in the bank was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

from mta.config import CalibrationSettings, Run
from mta.data.earlier import with_history
from mta.data.history import Item, Person
from mta.data.sharing import Copies
from mta.data.tasks.prompt import Example
from mta.data.tasks.task import Task
from mta.model.base import BaseModel


@dataclass(frozen=True, slots=True)
class Subject:
    """A person's earlier items (``shots``) and later items (``queries``) as examples.

    Where answers are labels, ``choices`` has every label for each of these items, and ``gold`` the right one's number.
    """

    shots: tuple[Example, ...]
    queries: tuple[Example, ...]
    choices: tuple[tuple[Example, ...], ...] = ()
    gold: tuple[int, ...] = ()

    @property
    def all(self) -> tuple[Example, ...]:
        return self.shots + self.queries

    def parted(self, turn: int) -> tuple[list[int], list[int]]:
        """Return the numbers of the items but for a block, and the block's: in turn 0 the queries, then before."""
        stop = max(len(self.all) - turn * len(self.queries), 0)
        block = range(max(stop - len(self.queries), 0), stop)
        return [n for n in range(len(self.all)) if n not in block], list(block)


def calibration_people(
    people: Sequence[Person],
    members: Set[str],
    settings: CalibrationSettings,
    seed: int,
    task: Task,
    unseen: Mapping[str, int],
) -> list[Person]:
    """Return the people to calibrate on, with the items that are measured: at most ``settings.people``, by hash.

    - Of the bank's ``members`` (ids), none; of people who kept first items back (``unseen``: id -> count), only these.
    - No items that several people hold (``Copies``): they could be in the other fold, or in the bank.
    - Nobody who shares more than half of their items: they could be a person in the bank under another id.
    - Nobody with fewer than two items left.
    """
    measurable = [{id(item) for item in person.items[: unseen.get(person.id)]} for person in people]
    apart = [
        replace(person, items=tuple(item for item in person.items if id(item) in own))
        for person, own in zip(map(Copies(people, task).alone, people), measurable)
    ]
    able = [person for person in apart if person.id not in members and len(person.items) > 1]
    return by_hash(able, seed)[: settings.people]


def by_hash(people: Sequence[Person], seed: int) -> list[Person]:
    """Return the people in the order of a hash of seed and id: those who calibrate a bank are the first."""
    return sorted(people, key=lambda one: hashlib.sha256(f"{seed}/{one.id}".encode()).digest())


def measured_items(
    people: Sequence[Person], settings: CalibrationSettings
) -> list[tuple[tuple[Item, ...], tuple[Item, ...]]]:
    """Return people's first items as shots, and the next as queries: what is measured is what newcomers can expect.

    Fewer people than ``settings.people`` are asked more each, if that leaves ``settings.shots`` items. At most half of
    a person's items are queries.
    """
    most = max(settings.queries, settings.people * settings.queries // max(len(people), 1))

    def parts(items: tuple[Item, ...]) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
        queries = min(most, len(items) // 2, max(settings.queries, len(items) - settings.shots))
        measured = items[: settings.shots + queries]
        return measured[:-queries], measured[-queries:]

    return [parts(person.items) for person in people]


def subjects_of(base: BaseModel, task: Task, people: Sequence[Person], run: Run) -> list[Subject]:
    """Return people's ``measured_items`` as examples, behind the earlier items that the bank's prompts show."""
    labels = (task.labels or ()) if task.labelled else ()

    def subject(shots: tuple[Item, ...], queries: tuple[Item, ...]) -> Subject:
        shown = with_history(task, Person("", shots, queries), run.task_lora.history)
        items, own = (*shown.items, *shown.queries), len(shots)
        examples = tuple(base.prompts.example(task, item) for item in items)
        if not labels:
            return Subject(examples[:own], examples[own:])
        choices = tuple(tuple(base.prompts.examples(task, item, labels)) for item in items)
        return Subject(
            examples[:own], examples[own:], choices, tuple(labels.index(task.target(item)) for item in items)
        )

    return [subject(shots, queries) for shots, queries in measured_items(people, run.calibration)]
