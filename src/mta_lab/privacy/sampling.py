"""Select the people and items of an attack on a bank, and number the items."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mta.bank.bank import Bank
from mta.bank.groups import items_of
from mta.data.history import Item, Person
from mta.data.sharing import connected
from mta.data.splits import draw
from mta.errors import InputError
from mta.evaluation.protocol import members_and_others
from mta_lab.behind import behind_task_lora
from mta_lab.privacy.settings import AttackSettings

AT_LEAST = 1000  # items of people outside the bank, if there are as many
Sets = Sequence[Sequence[int]]  # numbers of items, one list per model


@dataclass(frozen=True, slots=True)
class AttackSample:
    """People, each with the items that models are asked about.

    ``anchors`` are in the bank's order; ``trained`` are the same people with all items they were trained on. ``pool``
    are people behind the task LoRA who are no anchors; empty without a task LoRA, or if people behind it are missing.
    ``targets`` are personalized; each has shots and later items. ``others`` are neither in the bank nor targets.
    """

    anchors: list[Person]
    trained: list[Person]
    pool: list[Person]
    targets: list[Person]
    others: list[Person]


@dataclass(frozen=True, slots=True)
class NumberedItems:
    """All items that models are asked about; their positions are their numbers.

    ``owners`` numbers each item's person: anchor a of the bank is person a. ``anchors`` and ``pool`` are numbers per
    person, ``shots`` and ``later`` per target, and ``others`` numbers of all other people.
    """

    items: list[Item]
    owners: list[int]
    anchors: Sets
    pool: Sets
    others: list[int]
    shots: Sets
    later: Sets

    @classmethod
    def of(cls, sample: AttackSample, shots: int) -> NumberedItems:
        """Number the items of a sample; each target has ``shots`` shots."""
        groups, numbers = (sample.anchors, sample.pool, sample.others, sample.targets), itertools.count()
        people = [person for group in groups for person in group]
        anchors, pool, others, targets = ([[next(numbers) for _ in p.items] for p in group] for group in groups)
        return cls(
            [item for person in people for item in person.items],
            [owner for owner, person in enumerate(people) for _ in person.items],
            anchors,
            pool,
            flat(others),
            [theirs[:shots] for theirs in targets],
            [theirs[shots:] for theirs in targets],
        )

    @property
    def targets(self) -> list[int]:
        """The person number of each target."""
        return [self.owners[numbers[0]] for numbers in self.shots]

    def others_of(self, models: int) -> Sets:
        """Deal the others' items to models, each item to one model: asking every model about all costs too much."""
        return [self.others[model::models] for model in range(models)]

    def merged_items(self, gates: Tensor, count: int) -> Sets:
        """Return ``count`` items of the anchors with a coefficient, as many of each anchor; gates (U, N) -> U lists."""
        sets = [[self.anchors[int(a)] for a in w.nonzero().flatten()] for w in gates]
        return [spread(numbers, count, turn) for turn, numbers in enumerate(sets)]


def sample_people(bank: Bank, people: Sequence[Person], settings: AttackSettings, seed: int) -> AttackSample:
    """Find the bank's people among ``people`` by the bank's keyed hashes, and draw targets among the other people.

    Raises InputError if an anchor is missing or has other items than when the bank was built, and if fewer than two
    people are outside the bank.
    """
    if bank.info.members.hashed is None:
        raise InputError(
            "this bank came without its members: the people it was trained on are unknown",
            hint="Attack the bank where it was built, or copy its members.json.",
        )
    trained = _trained(bank, people)
    outside = [person for person in members_and_others(bank, people)[1] if person.items]
    able = [person for person in outside if len(person.items) > settings.shots]
    count = min(settings.targets, len(able), len(outside) // 2)
    if not count:
        raise InputError(
            f"{len(outside)} of {len(people)} people are outside the bank, {len(able)} of them with more than "
            f"{settings.shots} items; at least two people are needed, one of them with so many items",
            hint="Give people the bank was not built from, in addition to its own people, or lower shots=.",
        )
    targets = draw(able, seed, task=0, development=0, test=count, together=False).select("test", able)
    chosen, groups = {person.id for person in targets}, {person.group for person in targets if person.group}
    others = [person for person in outside if person.id not in chosen and person.group not in groups]
    if not others:
        raise InputError(
            f"the {len(outside)} people outside the bank share items with those who are personalized",
            hint="Give further people who share no items with others.",
        )
    each = _items_each([len(person.items) for person in others], AT_LEAST)
    return AttackSample(
        [_sample(person, settings.items, seed) for person in trained],
        trained,
        _pool(bank, people, settings.items * len(trained), seed),
        [person.first(2 * settings.shots) for person in targets],  # the shots, and as many later items
        [_sample(person, each, seed) for person in others],
    )


def _trained(bank: Bank, people: Sequence[Person]) -> list[Person]:
    """Return the items that each anchor was trained on, in the bank's order; those of a group as one person's."""
    behind, settings, info = [list[Person]() for _ in range(len(bank))], bank.info.run.bank, bank.info
    for person in sorted(people, key=lambda person: person.id):
        for number in info.members.anchors_of(person.id):
            behind[number].append(person)
    if missing := sum(info.people) - sum(map(len, behind)):
        raise InputError(
            f"{missing} people behind the bank's anchors are not among the {len(people)} people given; all are needed",
            hint="Give the people the bank was built from, and others, in one source.",
        )
    if settings.choose == "groups":
        trained = [Person(f"group {n}", tuple(items_of(group, info.run))) for n, group in enumerate(behind)]
    else:
        trained = [person.latest(settings.max_items) for (person,) in behind]
    if changed := sum(len(one.items) != then for one, then in zip(trained, info.items)):
        raise InputError(
            f"{changed} of {len(bank)} anchors have other items than when the bank was built; "
            "the items that the bank was trained on are unknown",
            hint="Give the histories the bank was built from.",
        )
    return trained


def _pool(bank: Bank, people: Sequence[Person], items: int, seed: int) -> list[Person]:
    """Return people behind the task LoRA who are no anchors, with items it was trained on, about ``items`` in all."""
    info = bank.info
    own = [person for person in people if info.members.parts_of(person.id)]
    if any(person.group for person in people):  # groups as when the bank was built, without others who connect them
        own = connected([replace(person, group="") for person in own], bank.task)[0]
    behind = [(person, of) for person in own if "task LoRA" in (of := info.members.parts_of(person.id))]
    if not bank.task_lora or len(behind) < info.members.task:
        return []  # the pooled items of a person depend on the missing people
    own = [person for person, of in behind if "clusters" not in of]
    candidates = [person for person, of in behind if "clusters" in of]
    anchors = {person.id for person, of in behind if "anchor" in of}
    trained = (
        person for person in behind_task_lora(bank, own, candidates, info.run.seed)[0] if person.id not in anchors
    )
    known = sorted(trained, key=lambda person: person.id)
    chosen = random.Random(seed).sample(known, min(items, len(known)))
    return [_sample(person, max(items // len(chosen), 1), seed) for person in chosen]


def _items_each(lengths: Sequence[int], wanted: int) -> int:
    """Return how many items per person make ``wanted`` items in all, or the longest history if there are fewer."""
    most = max(lengths)
    return next((k for k in range(1, most) if sum(min(k, n) for n in lengths) >= wanted), most)


def _sample(person: Person, count: int, seed: int) -> Person:
    """Return ``count`` items of a person in order, drawn with the seed and a hash of the items."""
    places = random.Random(f"{seed}/{person.digest()}").sample(range(len(person.items)), min(count, len(person.items)))
    return Person(person.id, tuple(person.items[place] for place in sorted(places)))


def spread(sets: Sets, count: int, turn: int) -> list[int]:
    """Return at most ``count`` numbers, evenly from all sets; each ``turn`` starts with another set and position."""
    share = -(-count // max(len(sets), 1))
    picked: list[int] = []
    for i in range(len(sets)):
        numbers = sets[(turn * count + i) % len(sets)]
        picked += [numbers[(turn * share + j) % len(numbers)] for j in range(min(share, len(numbers)))]
    return picked[:count]


def flat(sets: Sets) -> list[int]:
    """Return all numbers of the sets, in order."""
    return [number for numbers in sets for number in numbers]
