"""The people of an experiment: which part each person takes, and who is tested."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mta.data.bm25 import with_profiles
from mta.data.history import Item, Person
from mta.data.readers import read_people
from mta.data.readers.sharing import Copies
from mta.data.splits import Splits, draw
from mta.data.tasks.load import load_task
from mta.data.tasks.task import Task
from mta.errors import InputError
from mta.evaluation.experiments.recipe import Experiment, Part, Which
from mta.evaluation.protocol import has_enough_items, shots_and_queries
from mta.system.assets import is_asset, resolve

log = logging.getLogger("mta")
SHARES = (0.35, 0.1, 0.35)  # largest share of the qualified people in test, development, candidates


@dataclass(frozen=True, slots=True)
class Participants:
    """The people of an experiment. ``which`` says who is tested; ``sizes`` is the table written to sizes.json."""

    recipe: Experiment
    task: Task
    source: str
    people: Sequence[Person]
    splits: Splits
    sizes: dict[str, Any]
    which: Which = "test"

    @classmethod
    def read(cls, recipe: Experiment, data: str | None = None, which: Which = "test") -> Participants:
        """Read the people of ``data`` (or of the recipe) and draw the parts. Raises InputError without data."""
        source = data or recipe.data
        if source is None:
            raise InputError("this recipe brings no data", hint="Give --data with a LaMP file or folder.")
        task = load_task(recipe.run.task)
        people = read_people(resolve(source), task)
        splits, sizes = draw_parts(recipe, task, people)
        name = source if is_asset(source) else Path(source).name
        return cls(recipe, task, source, people, splits, {"data": name, **sizes}, which)

    def task_of(self, part: Part) -> Task:
        """Return the task in the wording of the part's prompts."""
        return self.task.profiled() if part.retrieve else self.task

    def trained_on(self, part: Part, which: Literal["candidates", "task"]) -> list[Person]:
        """Return people that a bank is trained on, with the earlier items that the part's prompts show."""
        people = self.splits.select(which, self.people)
        return [with_profiles(self.task, person, part.retrieve) for person in people] if part.retrieve else people

    def tested(self, part: Part, shots: int) -> list[Person]:
        """Return the tested people with enough items, in the order of the splits; empty if they are too few."""
        recipe, chosen = self.recipe, self.splits.select(self.which, self.people)
        able = [p for p in chosen if has_enough_items(self.task, p, shots, recipe.queries, recipe.ask)]
        return able[: part.people or recipe.compared] if len(able) >= min(recipe.few, len(chosen)) else []

    def hashed(self, id: str) -> str:
        """Return the name of a person or group in the records: a hash that only the whole data can resolve."""
        return hashlib.sha256(f"{self.splits.digest}/{id}".encode()).hexdigest()[:12]

    def question_id(self, person: Person, item: Item, number: int) -> str:
        """Return the id of a question in LaMP's files: the benchmark's own, or the person's hash and a number."""
        return item.id if item.is_query and item.id is not None else f"{self.hashed(person.id)}-{number}"


def draw_parts(recipe: Experiment, task: Task, people: list[Person]) -> tuple[Splits, dict[str, Any]]:
    """Draw the part of each person, and return the splits with a table of their sizes.

    People with enough items for the protocol and for an anchor qualify. Test, development and candidates are drawn from
    them, in shares that leave some people for each part of a small set. The other people train the task LoRA, except
    those who share items with another part. Raises InputError if there are too few people.
    """
    least, sizes = recipe.run.bank.min_items, recipe.people
    needed = recipe.shots + recipe.queries if task.asks_as_items else recipe.shots
    lengths = [len(p.items) + (task.asks_as_items and any(map(task.has_target, p.queries))) for p in people]
    qualified = [p for n, p in zip(lengths, people) if n >= max(least, needed) and len(p.items) >= least]
    test, development, candidates = (
        min(size, int(share * len(qualified)))
        for size, share in zip((sizes.test, sizes.development, sizes.candidates), SHARES)
    )
    first = draw(
        qualified, 0, task=0, development=development, test=test, candidates=candidates, together=sizes.together
    )
    taken = {*first.test, *first.development, *first.candidates}
    groups = {p.group for p in people if p.id in taken and p.group and sizes.together}
    rest = [p for p in people if p.id not in taken and p.group not in groups]
    task_size = min(sizes.task, len(rest))
    pooled = draw(rest, 0, task=task_size, development=0, test=0, candidates=0, together=sizes.together)
    splits = Splits(pooled.task, first.development, first.candidates, first.test)
    test_lengths = [n for n, p in zip(lengths, people) if p.id in first.test]
    return splits, {
        "people": len(people),
        "qualified": len(qualified),
        **{name: len(getattr(splits, name)) for name in ("task", "candidates", "development", "test")},
        "anchors": min(recipe.run.bank.anchors, len(splits.candidates) // 4),
        "queries": recipe.queries,
        "test people with shots": {m: sum(n >= m + recipe.queries for n in test_lengths) for m in (1, 4, 8, 16)},
        **_sharing(recipe, task, people, splits),
    }


def _sharing(recipe: Experiment, task: Task, people: list[Person], splits: Splits) -> dict[str, int]:
    """Count people who share items, their groups, and the test queries that occur in training histories."""
    shared = [person.group for person in people if person.group]
    if not shared:
        return {}
    shots, queries, ask = recipe.shots, recipe.queries, recipe.ask
    test = [p for p in splits.select("test", people) if has_enough_items(task, p, shots, queries, ask)]
    asked = [query for p in test for query in shots_and_queries(task, p, shots, queries, ask)[1]]
    trained = splits.select("task", people) + splits.select("candidates", people)
    found = Copies(people, task).in_histories(trained, asked)
    if found:
        log.warning("%d of %d test queries also occur in the histories of training people", found, len(asked))
    return {"people who share items": len(shared), "groups": len(set(shared)), "test queries trained on": found}
