"""The parts of an experiment's people: who is tested, and who a bank is trained on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from mta.data.history import Person
from mta.data.readers.sharing import Copies
from mta.data.splits import Splits, draw
from mta.data.tasks.task import Task
from mta.evaluation.experiments.recipe import Experiment
from mta.evaluation.protocol import has_enough_items, shots_and_queries

log = logging.getLogger("mta")
SHARES = (0.35, 0.1, 0.35)  # largest share of the qualified people in test, development, candidates


def draw_parts(recipe: Experiment, task: Task, people: Sequence[Person]) -> tuple[Splits, dict[str, Any]]:
    """Draw the part of each person, and return the splits with a table of their sizes.

    People with enough items for the protocol and for an anchor qualify. Test, development and candidates are drawn from
    them, in shares that leave some people for each part of a small set. The other people train the task LoRA, except
    those who share items with another part. Raises InputError if there are too few people.
    """
    least, sizes = recipe.run.bank.min_items, recipe.people
    needed = recipe.shots + recipe.queries if task.asks_as_items else recipe.shots
    lengths = [len(p.items) + (task.asks_as_items and any(map(task.has_target, p.queries))) for p in people]
    qualified = [p for n, p in zip(lengths, people) if n >= max(least, needed) and len(p.items) >= least]
    wanted = zip((sizes.test, sizes.development, sizes.candidates), SHARES)
    test, development, candidates = (min(size, int(share * len(qualified))) for size, share in wanted)
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


def _sharing(recipe: Experiment, task: Task, people: Sequence[Person], splits: Splits) -> dict[str, int]:
    """Count people who share items, their groups, and the test queries that occur in training histories."""
    shared = [person.group for person in people if person.group]
    if not shared:
        return {}
    protocol = recipe.shots, recipe.queries, recipe.ask
    test = [p for p in splits.select("test", people) if has_enough_items(task, p, *protocol)]
    asked = [query for p in test for query in shots_and_queries(task, p, *protocol)[1]]
    trained = splits.select("task", people) + splits.select("candidates", people)
    found = Copies(people, task).in_histories(trained, asked)
    if found:
        log.warning("%d of %d test queries also occur in the histories of training people", found, len(asked))
    return {"people who share items": len(shared), "groups": len(set(shared)), "test queries trained on": found}
