"""Find sets of items that are nearly equal, in a time that grows little faster than the number of sets.

Rules, limits, and measurements: docs/decisions/019-shared-items.md.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

SAME_USER = 0.5  # Jaccard index of two profiles from which on both belong to one user
SAME_ITEMS = 5  # and the two profiles share at least this many items


class Sets:
    """Disjoint sets of the numbers 0 to n - 1."""

    def __init__(self, count: int) -> None:
        self._above = list(range(count))

    def root(self, n: int) -> int:
        while self._above[n] != n:
            self._above[n] = n = self._above[self._above[n]]
        return n

    def join(self, numbers: Iterable[int]) -> None:
        roots = {self.root(n) for n in numbers}
        first = min(roots)
        for root in roots:
            self._above[root] = first

    def groups(self) -> list[list[int]]:
        """All sets, each in ascending order, by their smallest number."""
        found: dict[int, list[int]] = {}
        for n in range(len(self._above)):
            found.setdefault(self.root(n), []).append(n)
        return list(found.values())


def nearly_equal(profiles: Sequence[frozenset[Hashable]]) -> Sets:
    """Join the numbers of profiles that share at least ``SAME_ITEMS`` items and half of the items in either.

    Equal profiles are joined first, and only one of them is compared with others. Profiles are compared only if they
    share ``SAME_ITEMS`` of their rarest items (prefix filtering) and are not joined yet.
    """
    sets, equal = Sets(len(profiles)), defaultdict[frozenset[Hashable], list[int]](list)
    for n, profile in enumerate(profiles):
        if len(profile) >= SAME_ITEMS:
            equal[profile].append(n)
    for numbers in equal.values():
        sets.join(numbers)
    held = Counter(item for profile in equal for item in profile)
    ranks = {item: rank for rank, item in enumerate(sorted(held, key=held.__getitem__))}
    index = _Index(sets)
    for profile, numbers in sorted(equal.items(), key=lambda one: len(one[0])):
        # Items of one profile alone are the rarest, and find nothing.
        index.add(numbers[0], frozenset(ranks[item] for item in profile), sum(held[item] == 1 for item in profile))
    return sets


@dataclass(slots=True)
class _Posting:
    """The profiles that hold an item, and whether all of them are in one set."""

    numbers: array[int] = field(default_factory=lambda: array("q"))
    joined: bool = True


class _Index:
    """Profiles by their rarest items; they come in ascending order of size."""

    def __init__(self, sets: Sets) -> None:
        self._sets = sets
        self._profiles: dict[int, frozenset[int]] = {}
        self._postings = defaultdict[int, _Posting](_Posting)

    def add(self, n: int, profile: frozenset[int], alone: int) -> None:
        """Join a profile with those before it that are nearly equal; its ``alone`` rarest items are in no other."""
        ranked, size, root = sorted(profile), len(profile), self._sets.root
        self._profiles[n] = profile
        # Two profiles have at least half of the larger and two thirds of the smaller one's items in common. So the
        # SAME_ITEMS rarest of the common items are among the rarest of either, as many as `_prefix` says.
        found: list[_Posting] = []
        for item in ranked[alone : _prefix(size, -(-size // 2))]:
            posting = self._postings[item]
            if posting.numbers and posting.joined and root(posting.numbers[-1]) != root(n):
                self._compare(n, posting.numbers[-1])
            found.append(posting)
        apart = [one for one in found if one.numbers and not (one.joined and root(one.numbers[0]) == root(n))]
        for other in _often([one.numbers for one in apart]):
            self._compare(n, other)
        for item in ranked[alone : _prefix(size, -(-2 * size // 3))]:
            posting = self._postings[item]
            posting.joined = posting.joined and (not posting.numbers or root(posting.numbers[0]) == root(n))
            posting.numbers.append(n)

    def _compare(self, n: int, other: int) -> None:
        if self._sets.root(n) != self._sets.root(other) and alike(self._profiles[n], self._profiles[other]):
            self._sets.join((n, other))


def _often(postings: Sequence[array[int]]) -> list[int]:
    """The profiles that at least ``SAME_ITEMS`` of the postings name. Long postings make this the slowest step."""
    if len(postings) < SAME_ITEMS:
        return []
    import numpy as np  # not before it is needed: `import mta` stays light

    named = np.sort(np.concatenate([np.frombuffer(one, np.int64) for one in postings]))
    last = named[SAME_ITEMS - 1 :]
    return np.unique(last[last == named[: len(last)]]).tolist()


def _prefix(size: int, common: int) -> int:
    return size - max(common, SAME_ITEMS) + SAME_ITEMS


def alike(one: frozenset[int], other: frozenset[int]) -> bool:
    """Whether two profiles are nearly equal."""
    common = len(one & other)
    return common >= SAME_ITEMS and common >= SAME_USER * (len(one) + len(other) - common)
