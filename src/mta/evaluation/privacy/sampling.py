"""Who takes which part in an attack on a bank, and which of their items are asked about."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mta.bank.bank import Bank
from mta.bank.task_lora import pooled_items
from mta.config import Privacy
from mta.data.history import Person
from mta.data.splits import draw
from mta.errors import InputError
from mta.evaluation.protocol import apart

AT_LEAST = 1000  # items of people who are in nothing of the bank, where there are so many
LATER = 1  # times the shots: how many later items of a target are held against their shots


@dataclass(frozen=True, slots=True)
class Cast:
    """People with the items that are asked about.

    ``anchors`` in the bank's order, ``trained`` the same with all items they were trained on; ``pool`` the people
    behind the task LoRA (nobody where some of them are not known, or there is no task LoRA); ``targets``, who are
    personalized, each with ``shots`` and later items; ``others``, who are in nothing of the bank and no targets.
    """

    anchors: list[Person]
    trained: list[Person]
    pool: list[Person]
    targets: list[Person]
    others: list[Person]


def cast(bank: Bank, people: Sequence[Person], settings: Privacy, seed: int) -> Cast:
    """Find the bank's people among ``people`` by its keyed hashes, and draw targets among those it does not know.

    Raises InputError where an anchor is missing or has other items than when the bank was built, and where fewer than
    two people are in nothing of the bank.
    """
    if bank.info.members.hashed is None:
        raise InputError(
            "this bank came without its members: whom it was trained on cannot be told",
            hint="Attack it where it was built, or have its members.json.",
        )
    parts = [(person, bank.info.members.artefacts_of(person.id)) for person in people]
    anchors = sorted((person for person, of in parts if "anchor" in of), key=lambda person: person.id)
    _check_anchors(bank, anchors, len(people))
    trained = [person.latest(bank.info.run.bank.max_items) for person in anchors]
    strangers = [person for person in apart(bank, people)[1] if person.items]
    able = [person for person in strangers if len(person.items) > settings.shots]
    count = min(settings.targets, len(able), len(strangers) // 2)
    if not count:
        raise InputError(
            f"{len(strangers)} of {len(people)} people are in nothing of the bank, "
            f"{len(able)} of them with more than {settings.shots} items; at least two are needed, one with so many",
            hint="Give people the bank was not built from beside its own, or lower shots=.",
        )
    targets = draw(able, seed, task=0, development=0, test=count, together=False).select("test", able)
    chosen, groups = {person.id for person in targets}, {person.group for person in targets if person.group}
    others = [person for person in strangers if person.id not in chosen and person.group not in groups]
    each = _each([len(person.items) for person in others], AT_LEAST)
    return Cast(
        [_sample(person, settings.items, seed) for person in trained],
        trained,
        _pool(bank, [person for person, of in parts if "task LoRA" in of], settings.items * len(anchors), seed),
        [person.first((1 + LATER) * settings.shots) for person in targets],
        [_sample(person, each, seed) for person in others],
    )


def _check_anchors(bank: Bank, anchors: Sequence[Person], people: int) -> None:
    if len(anchors) < len(bank):
        raise InputError(
            f"{len(anchors)} of the bank's {len(bank)} anchors are among the {people} people given; all are needed",
            hint="Give the people the bank was built from, and others, in one source.",
        )
    found, built = [len(person.items) for person in anchors], list(bank.info.items)
    if changed := sum(now != then for now, then in zip(found, built)):
        raise InputError(
            f"{changed} of {len(bank)} anchors have other items than when the bank was built; "
            "which of them it was trained on cannot be told",
            hint="Give the histories the bank was built from.",
        )


def _pool(bank: Bank, people: Sequence[Person], items: int, seed: int) -> list[Person]:
    """The people behind the task LoRA with items it was trained on, about ``items`` in all."""
    run = bank.info.run
    if not bank.task_lora or len(people) < bank.info.members.task:
        return []  # who is missing decides which items of the others were pooled
    pooled = {id(item) for item in pooled_items(people, run.task_lora, run.seed)}
    theirs = [Person(p.id, tuple(item for item in p.items if id(item) in pooled)) for p in people]
    known = sorted((person for person in theirs if person.items), key=lambda person: person.id)
    chosen = random.Random(seed).sample(known, min(items, len(known)))
    return [_sample(person, max(items // len(chosen), 1), seed) for person in chosen]


def _each(lengths: Sequence[int], wanted: int) -> int:
    """How many items of everybody make ``wanted``; as many as there are where that is less."""
    most = max(lengths)
    return next((k for k in range(1, most) if sum(min(k, n) for n in lengths) >= wanted), most)


def _sample(person: Person, count: int, seed: int) -> Person:
    """So many of a person's items, drawn by the seed and their content, in order."""
    places = random.Random(f"{seed}/{person.digest()}").sample(range(len(person.items)), min(count, len(person.items)))
    return Person(person.id, tuple(person.items[place] for place in sorted(places)))
