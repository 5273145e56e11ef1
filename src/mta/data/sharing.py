"""Find people who hold copies of the same items.

Rules, limits, and measurements: docs/decisions/019-shared-items.md.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mta.data.history import Item, Person
from mta.data.tasks.task import Task

SAME_ITEMS = 5  # least number of items that two records of one user share: a few popular films are shared by chance
LONG = 64  # characters: two people can write a shorter text by coincidence
CROWD = 10  # people: an item held by more people is common text and connects no people
Key = tuple[bytes, bytes]  # digests of an item's inputs and of its answer


@dataclass(frozen=True, slots=True)
class SharedItems:
    """Counts of shared items: ``items`` connect ``people`` into ``groups``; ``largest`` is the largest group's size."""

    items: int = 0
    people: int = 0
    groups: int = 0
    largest: int = 0

    def __str__(self) -> str:
        if not self.people:
            return "none"
        groups = f"{self.people} people in {self.groups} groups of at most {self.largest}"
        return f"{self.items} items belong to more than one person and connect {groups}"


def sameness(item: Item) -> tuple[object, ...]:
    """Return a key that copies of an item share: all fields and the time, but not the id.

    LaMP numbers the items of each record separately, so ids neither identify an item nor are unique.
    """
    return (item.time, *sorted(item.fields.items()))


def repeated(people: Iterable[Person]) -> int:
    """Return the number of items that are copies of an earlier one of the same person.

    In an evaluation, a shot would be asked again.
    """
    return sum(len(one.items) - len(set(map(sameness, one.items))) for one in people)


def missing_from(known: Sequence[Item], items: Sequence[Item]) -> list[Item]:
    """Return the items that ``known`` does not hold as often as ``items`` does."""
    left = Counter(map(sameness, known))
    missing = []
    for item in items:
        if left[sameness(item)] > 0:
            left[sameness(item)] -= 1
        else:
            missing.append(item)
    return missing


class Copies:
    """Copies of items that several of ``people`` hold, in their histories or as queries with a known answer.

    ``holders``: key of a shared item -> numbers of the people who hold a copy.
    """

    def __init__(self, people: Sequence[Person], task: Task) -> None:
        self.task = task
        self.holders: dict[Key, set[int]] = {}
        by_inputs = self._several(people)
        if task.labelled and _independent(by_inputs.values(), people, task):
            return
        for inputs, answers in by_inputs.items():
            total = sum(map(len, answers.values()))
            answer, holders = max(answers.items(), key=lambda one: len(one[1]))
            if total <= CROWD and 2 * len(holders) > total:  # an answer that most holders copied
                self.holders[inputs, answer] = holders

    def in_histories(self, people: Iterable[Person], queries: Iterable[Item]) -> int:
        """Count the queries that have a copy in the histories of ``people``."""
        known = {key for person in people for item in person.items if (key := self._key(item)) in self.holders}
        return sum(self._key(query) in known for query in queries)

    def alone(self, person: Person) -> Person:
        """Return a person with the items that no other holds; without items if these are less than half of theirs."""
        items = tuple(item for item in person.items if self._key(item) not in self.holders)
        return replace(person, items=items if 2 * len(items) >= len(person.items) else ())

    def _several(self, people: Sequence[Person]) -> dict[bytes, dict[bytes, set[int]]]:
        """Return inputs that several people hold -> answers -> numbers of the people who give them."""
        first: dict[bytes, int] = {}
        several: set[bytes] = set()
        for number, (inputs, _) in self._keys(people):
            if first.setdefault(inputs, number) != number:
                several.add(inputs)
        holders: dict[bytes, dict[bytes, set[int]]] = {}
        for number, (inputs, answer) in self._keys(people) if several else ():
            if inputs in several:
                holders.setdefault(inputs, {}).setdefault(answer, set()).add(number)
        return holders

    def _keys(self, people: Sequence[Person]) -> Iterator[tuple[int, Key]]:
        for number, person in enumerate(people):
            for item in (*person.items, *person.queries):
                if key := self._key(item):
                    yield number, key

    def _key(self, item: Item) -> Key | None:
        """Return digests of an item's inputs and answer; None for fewer than ``LONG`` characters."""
        task = self.task
        if not task.has_target(item):
            return None
        target = _plain(task.target(item))
        names = task.item.inputs if task.asks_like_items(item) else ()
        inputs = [_plain(item.fields.get(name, "")) for name in names]  # other fields are refused later
        # Labels are few: an equal label does not indicate a copy.
        if sum(map(len, inputs)) + (0 if task.labelled else len(target)) < LONG:
            return None
        return (digest(inputs), digest([target])) if task.labelled else (digest([*inputs, target]), b"")


def connected(people: Sequence[Person], task: Task) -> tuple[list[Person], SharedItems]:
    """Return the people with their groups, and counts of what they share.

    People who hold a copy of one item, directly or through others, are in one group, named by its smallest person id.
    People who share nothing have no group.
    """
    if not (copies := Copies(people, task)).holders:
        return list(people), SharedItems()
    from scipy.cluster.hierarchy import DisjointSet  # here: the import takes a third of a second

    sets = DisjointSet(range(len(people)))
    for holders in copies.holders.values():
        first, *others = holders
        for other in others:
            sets.merge(first, other)
    groups = [group for group in sets.subsets() if len(group) > 1]
    names = {n: min(people[m].id for m in group) for group in groups for n in group}
    sizes = Counter(names.values())
    counts = {"people": len(names), "groups": len(sizes), "largest": max(sizes.values(), default=0)}
    shared = SharedItems(len(copies.holders), **counts)
    return [replace(person, group=names.get(n, person.group)) for n, person in enumerate(people)], shared


def _independent(inputs: Collection[Mapping[bytes, set[int]]], people: Sequence[Person], task: Task) -> bool:
    """Return whether people answer common inputs independently.

    Then two answers to one input differ over half as often as two answers drawn from all answers. Returns False for
    fewer than ``SAME_ITEMS`` common inputs.
    """
    if len(inputs) < SAME_ITEMS:
        return False
    counts = Counter(task.target(item) for person in people for item in person.items)
    chance = 1 - sum((count / counts.total()) ** 2 for count in counts.values())
    return sum(map(_differing, inputs)) / len(inputs) > chance / 2


def _differing(answers: Mapping[bytes, set[int]]) -> float:
    """Return the share of pairs of answers to one input that differ."""
    counts = [len(holders) for holders in answers.values()]
    total = sum(counts)
    return 1 - sum(count * (count - 1) for count in counts) / (total * (total - 1))


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def digest(texts: Sequence[str]) -> bytes:
    """Return a short hash of texts."""
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=16).digest()
