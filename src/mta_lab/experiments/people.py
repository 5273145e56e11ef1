"""The parts of an experiment's people: who is tested, and who a bank is trained on."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mta.config.constants import SHOTS
from mta.data.history import Person, own_fields
from mta.data.sharing import SAME_ITEMS, Copies, connected
from mta.data.shots_and_queries import has_enough_items, shots_and_queries
from mta.data.splits import Splits, draw
from mta.data.tasks.task import Task
from mta.errors import InputError
from mta_lab.experiments.recipe import Experiment

log = logging.getLogger("mta")
SHARES = (0.35, 0.1, 0.5)  # largest share of the qualified people in test, development, candidates


def with_tested(
    recipe: Experiment, task: Task, people: Sequence[Person], tested: Sequence[Person]
) -> tuple[list[Person], list[Person]]:
    """Return the people who may train if ``tested`` people of another source are tested, and the latter.

    People who hold a tested person's history are left out, and with ``people.together`` those who share an item with a
    tested person. Ids of tested people get a prefix: both sources may number people alike, and other histories under
    the same ids need new results. Raises InputError if no tested person has enough items.
    """
    able = [p for p in tested if has_enough_items(task, p, recipe.shots, recipe.queries, recipe.ask)]
    if not able:
        raise InputError(
            f"none of the {len(tested)} people to test has {recipe.shots} shots and {recipe.queries} queries",
            hint="Lower shots= or queries=.",
        )
    version = hashlib.sha256("".join(p.digest() + Person(p.id, p.queries).digest() for p in able).encode())
    renamed = [replace(p, id=f"tested-{version.hexdigest()[:8]}/{p.id}") for p in able]
    every, _ = connected([replace(person, group="") for person in (*people, *renamed)], task)
    known, new = every[: len(people)], every[len(people) :]
    same = _holders_of(new, known)
    apart = _apart([p for n, p in enumerate(known) if n not in same], new, recipe.people.together)
    if (out := len(people) - len(apart)) or len(able) < len(tested):
        counts = out, len(people), len(tested) - len(able), len(tested)
        log.warning("%d of %d people share items with tested people; %d of %d tested people have few items", *counts)
    return apart, new


def draw_splits(
    recipe: Experiment, task: Task, people: Sequence[Person], tested: Sequence[Person] = ()
) -> tuple[Splits, dict[str, Any]]:
    """Draw the part of each person, and return the splits with a table of their sizes.

    People with enough items for the protocol and for an anchor qualify. Test, development and candidates are drawn from
    them, but not from ``never_tested`` people, in shares that leave some people for each part of a small set. The other
    people train the task LoRA, except those who share items with another part. ``tested`` people (of ``with_tested``),
    if given, are the test part; then no others are drawn for it, and up to 85% of the qualified people are candidates.
    Raises InputError if there are too few people.
    """
    least, sizes, together = recipe.run.bank.min_items, recipe.people, recipe.people.together
    given = tested[: sizes.test]
    needed = recipe.shots + recipe.queries if task.asks_as_items else recipe.shots
    lengths = {p.id: len(p.items) + (task.asks_as_items and any(map(task.has_target, p.queries))) for p in people}
    qualified = [p for p in people if lengths[p.id] >= max(least, needed) and len(p.items) >= least]
    shares = (0.0, SHARES[1], SHARES[0] + SHARES[2]) if given else SHARES
    wanted = zip((sizes.test, sizes.development, sizes.candidates), shares)
    test, development, candidates = (min(size, int(share * len(qualified))) for size, share in wanted)
    if 0 < sizes.never_tested > len(qualified) - test - development - candidates:
        raise InputError(
            f"{sizes.never_tested} people are never tested (people.never_tested); of the other "
            f"{max(len(qualified) - sizes.never_tested, 0)} people with enough items, "
            f"{test + development + candidates} are needed",
            hint="If no settings were chosen on people of this file, add:  people.never_tested=0",
        )
    known = draw(qualified, 0, task=0, development=0, test=sizes.never_tested, candidates=0, together=together)
    free = [p for p in qualified if p.id not in known.test]
    drawn = draw(free, 0, task=0, development=development, test=test, candidates=candidates, together=together)
    taken = {*drawn.test, *drawn.development, *drawn.candidates}
    rest = _apart([p for p in people if p.id not in taken], [p for p in people if p.id in taken], together)
    task_size = min(sizes.task, len(rest))
    pooled = draw(rest, 0, task=task_size, development=0, test=0, candidates=0, together=together)
    test_ids = tuple(person.id for person in given) or drawn.test
    splits = Splits(pooled.task, drawn.development, drawn.candidates, test_ids)
    people = [*people, *given]
    asked = splits.select("test", people)
    return splits, {
        "people": len(people),
        "qualified": len(qualified),
        **{name: len(getattr(splits, name)) for name in ("task", "candidates", "development", "test")},
        "anchors": min(recipe.run.bank.anchors, len(splits.candidates) // 4),
        "queries": recipe.queries,
        "test people with shots": {
            m: sum(has_enough_items(task, p, m, recipe.queries, recipe.ask) for p in asked) for m in SHOTS
        },
        **_sharing(recipe, task, people, splits),
    }


def _holders_of(histories: Sequence[Person], people: Sequence[Person]) -> set[int]:
    """Return the numbers of the people who hold at least half of one of the histories, and ``SAME_ITEMS`` of its items.

    Unlike ``connected`` this finds a short excerpt of a long history, whatever the task.
    """
    contents, owners = [_contents(person) for person in histories], defaultdict[str, list[int]](list)
    for number, held in enumerate(contents):
        for item in held:
            owners[item].append(number)
    holders = set()
    for number, person in enumerate(people):
        counts = Counter(owner for item in _contents(person) for owner in owners.get(item, ()))
        if any(count >= max(SAME_ITEMS, len(contents[owner]) / 2) for owner, count in counts.items()):
            holders.add(number)
    return holders


def _contents(person: Person) -> frozenset[str]:
    """Return the texts of a person's items, without case, spaces, ids, times, and earlier items that they show."""
    texts = ("\0".join(text for field in own_fields(item) for text in field) for item in person.items)
    return frozenset(" ".join(text.split()).casefold() for text in texts)


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
    copies = Copies(people, task).in_histories(trained, asked)
    if copies:
        log.warning("%d of %d test queries also occur in the histories of training people", copies, len(asked))
    return {"people who share items": len(shared), "groups": len(set(shared)), "test queries trained on": copies}
