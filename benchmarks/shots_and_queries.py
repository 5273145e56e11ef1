"""How much knowing a person can help at all, for three ways of choosing shots and queries (docs/decisions/005).

No language model: a movie's mean rating among other people, and the person's mean deviation from it over the shots,
shrunk. Run:  python -m benchmarks.shots_and_queries
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

from mta.data.history import Item, Person
from mta.data.readers import read_people
from mta.data.splits import draw
from mta.system.assets import fetch

SHRINK = 8.0
WAYS: dict[str, tuple[Callable[[Person], Sequence[Item]], Callable[[Person], Sequence[Item]]]] = {
    "first 8, last 12": (lambda p: p.items[:8], lambda p: p.items[-12:]),
    "first 8, next 12": (lambda p: p.items[:8], lambda p: p.items[8:20]),
    "the 8 before the last 12, last 12": (lambda p: p.items[-20:-12], lambda p: p.items[-12:]),
}


def rating(item: Item) -> int:
    """The stars of an item."""
    return int(item.fields["rating"])


def nll(mean: float, stars: int) -> float:
    """Minus log probability of the stars under a discretized unit Gaussian around ``mean``."""
    weights = [math.exp(-((k - mean) ** 2) / 2) for k in range(1, 6)]
    return -math.log(weights[stars - 1] / sum(weights))


def distance(mean: float, stars: int) -> float:
    """How far the nearest rating to ``mean`` is from the stars."""
    return abs(min(max(round(mean), 1), 5) - stars)


def main() -> None:
    """Print the change in NLL and in MAE for every way, with 95% intervals over people."""
    people = read_people(fetch("movielens-100k"), "movielens-rating")
    parts = draw(people, 0, task=0, development=0, test=300)
    ratings = defaultdict(list)
    for person in parts.select("candidates", people):
        for item in person.items:
            ratings[item.fields["title"]].append(rating(item))
    overall = statistics.mean(stars for given in ratings.values() for stars in given)
    means = {title: (sum(given) + 5 * overall) / (len(given) + 5) for title, given in ratings.items()}

    def expected(item: Item) -> float:
        return means.get(item.fields["title"], overall)

    for name, (shots, queries) in WAYS.items():
        found = []
        for measure in (nll, distance):
            changes = []
            for person in parts.select("test", people):
                deviations = [rating(item) - expected(item) for item in shots(person)]
                bias = sum(deviations) / (len(deviations) + SHRINK)
                asked = [(expected(item), rating(item)) for item in queries(person)]
                changes.append(statistics.mean(measure(m + bias, stars) - measure(m, stars) for m, stars in asked))
            found.append(
                f"{statistics.mean(changes):+.3f} +- {1.96 * statistics.stdev(changes) / len(changes) ** 0.5:.3f}"
            )
        print(f"{name:36} NLL {found[0]}   MAE {found[1]}")


if __name__ == "__main__":
    main()
