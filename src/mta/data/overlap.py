"""Find sets of items that are nearly equal, in almost linear time.

Rules, limits, and measurements: docs/decisions/019-shared-items.md.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

SAME_USER = 0.5  # least Jaccard index of two profiles of one user
SAME_ITEMS = 5  # least number of items that two profiles of one user share


class Sets:
    """Disjoint sets of the numbers 0 to n - 1 (union-find)."""

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
        """Return all sets, each in ascending order, sorted by their smallest number."""
        found: dict[int, list[int]] = {}
        for n in range(len(self._above)):
            found.setdefault(self.root(n), []).append(n)
        return list(found.values())


def nearly_equal(profiles: Sequence[frozenset[Hashable]]) -> Sets:
    """Join the numbers of profiles that share at least ``SAME_ITEMS`` items and half of their union.

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
        # Items that occur in only one profile are the rarest and match no other profile.
        index.add(numbers[0], frozenset(ranks[item] for item in profile), sum(held[item] == 1 for item in profile))
    return sets


@dataclass(slots=True)
class _Posting:
    """The profiles that contain an item, and whether all of them are in one set."""

    numbers: array[int] = field(default_factory=lambda: array("q"))
    joined: bool = True


class _Index:
    """Inverted index from rare items to profiles, which are added in ascending order of size."""

    def __init__(self, sets: Sets) -> None:
        self._sets = sets
        self._profiles: dict[int, frozenset[int]] = {}
        self._postings = defaultdict[int, _Posting](_Posting)

    def add(self, n: int, profile: frozenset[int], alone: int) -> None:
        """Join a profile with nearly equal earlier profiles. Its ``alone`` rarest items are in no other profile."""
        ranked, size, root = sorted(profile), len(profile), self._sets.root
        self._profiles[n] = profile
        # Nearly equal profiles share at least half of the larger profile and two thirds of the smaller one. So their
        # SAME_ITEMS rarest common items are among the `_prefix` rarest items of each profile.
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
    """Return the profiles in at least ``SAME_ITEMS`` of the postings. With long postings this is the slowest step."""
    if len(postings) < SAME_ITEMS:
        return []
    import numpy as np  # imported late: `import mta` stays light

    named = np.sort(np.concatenate([np.frombuffer(one, np.int64) for one in postings]))
    last = named[SAME_ITEMS - 1 :]
    return np.unique(last[last == named[: len(last)]]).tolist()


def _prefix(size: int, common: int) -> int:
    return size - max(common, SAME_ITEMS) + SAME_ITEMS


def alike(one: frozenset[int], other: frozenset[int]) -> bool:
    """Return whether two profiles are nearly equal."""
    common = len(one & other)
    return common >= SAME_ITEMS and common >= SAME_USER * (len(one) + len(other) - common)
