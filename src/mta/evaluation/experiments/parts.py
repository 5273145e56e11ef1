"""The parts of an experiment's people: who is tested, and who a bank is trained on."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mta.bank.bank import Bank
from mta.bank.build import LOSSES
from mta.bank.selection import pooled_items
from mta.config import Run, override
from mta.data.history import Person
from mta.data.readers.sharing import Copies, connected
from mta.data.splits import Splits, draw
from mta.data.tasks.task import Task
from mta.errors import InputError
from mta.evaluation.experiments.recipe import Experiment
from mta.evaluation.protocol import has_enough_items, shots_and_queries
from mta.tracking.run_folder import sittings

log = logging.getLogger("mta")
SHARES = (0.35, 0.1, 0.35)  # largest share of the qualified people in test, development, candidates


def with_tested(people: Sequence[Person], tested: Sequence[Person], task: Task) -> tuple[list[Person], list[Person]]:
    """Return people and ``tested`` people of another source, with the groups that they form together.

    Ids of tested people get a prefix, because both sources may number people alike.
    """
    renamed = [replace(person, id=f"tested/{person.id}") for person in tested]
    every, _ = connected([replace(person, group="") for person in (*people, *renamed)], task)
    return every[: len(people)], every[len(people) :]


def draw_parts(
    recipe: Experiment, task: Task, people: Sequence[Person], tested: Sequence[Person] = ()
) -> tuple[Splits, dict[str, Any]]:
    """Draw the part of each person, and return the splits with a table of their sizes.

    People with enough items for the protocol and for an anchor qualify. Test, development and candidates are drawn from
    them, in shares that leave some people for each part of a small set. The other people train the task LoRA, except
    those who share items with another part. ``tested`` people of another source are all in the test part, as far as
    they have enough items, and the candidates get the share of the test.
    Raises InputError if there are too few people.
    """
    least, sizes, together = recipe.run.bank.min_items, recipe.people, recipe.people.together
    given = [p for p in tested if has_enough_items(task, p, recipe.shots, recipe.queries, recipe.ask)][: sizes.test]
    if tested and not given:
        raise InputError(
            f"none of the {len(tested)} people to test has {recipe.shots} shots and {recipe.queries} queries",
            hint="Lower shots= or queries=.",
        )
    people = _apart(people, tested, together)
    needed = recipe.shots + recipe.queries if task.asks_as_items else recipe.shots
    lengths = [len(p.items) + (task.asks_as_items and any(map(task.has_target, p.queries))) for p in people]
    qualified = [p for n, p in zip(lengths, people) if n >= max(least, needed) and len(p.items) >= least]
    shares = (0.0, SHARES[1], SHARES[0] + SHARES[2]) if given else SHARES
    wanted = zip((sizes.test, sizes.development, sizes.candidates), shares)
    test, development, candidates = (min(size, int(share * len(qualified))) for size, share in wanted)
    first = draw(qualified, 0, task=0, development=development, test=test, candidates=candidates, together=together)
    taken = {*first.test, *first.development, *first.candidates}
    rest = _apart([p for p in people if p.id not in taken], [p for p in people if p.id in taken], together)
    task_size = min(sizes.task, len(rest))
    pooled = draw(rest, 0, task=task_size, development=0, test=0, candidates=0, together=together)
    chosen = tuple(person.id for person in given) or first.test
    splits = Splits(pooled.task, first.development, first.candidates, chosen)
    people = [*people, *tested]
    lengths += [len(p.items) + sum(map(task.has_target, p.queries)) for p in tested]
    test_lengths = [n for n, p in zip(lengths, people) if p.id in chosen]
    return splits, {
        "people": len(people),
        "qualified": len(qualified),
        **{name: len(getattr(splits, name)) for name in ("task", "candidates", "development", "test")},
        "anchors": min(recipe.run.bank.anchors, len(splits.candidates) // 4),
        "queries": recipe.queries,
        "test people with shots": {m: sum(n >= m + recipe.queries for n in test_lengths) for m in (1, 4, 8, 16)},
        **_sharing(recipe, task, people, splits),
    }


def _apart(people: Sequence[Person], others: Sequence[Person], together: bool) -> list[Person]:
    """Return the people who share no items with ``others``; with ``together`` unset, all people."""
    groups = {person.group for person in others if person.group and together}
    return [person for person in people if person.group not in groups]


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


def as_long(run: Run, bank: Bank, folder: Path, task_people: Sequence[Person]) -> Run:
    """Return a run whose task LoRA takes as many steps as the bank in ``folder`` took for its task LoRA and anchors.

    Counts examples, in batches of the task LoRA's size.
    """
    built = bank.info.run
    rounds = next((len(one[LOSSES]) for one in reversed(sittings(folder)) if LOSSES in one), 1)
    pooled = len(pooled_items(task_people, built.task_lora, built.seed)[0])
    own = sum(min(items, built.bank.max_items) for items in bank.info.items)
    examples = rounds * built.task_lora.training.epochs * pooled + built.bank.training.epochs * own
    steps = math.ceil(examples / run.task_lora.training.batch_size)
    return override(run, ["task_lora.rounds=1", f"task_lora.training.steps={steps}"])
