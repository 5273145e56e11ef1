"""Count what a set of people holds, for a summary of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from mta.config import CompareSettings, Run
from mta.config.constants import SHOTS
from mta.data.history import Person
from mta.data.shots_and_queries import QueryOrder, has_enough_items
from mta.data.tasks.task import Task

QUERIES = 4  # of a person in a recipe


def describe(people: Sequence[Person]) -> dict[str, float]:
    """Return counts for a summary: people, items per person (min, median, max), and queries."""
    counts = [len(person.items) for person in people] or [0]
    return {
        "people": len(people),
        "items": sum(counts),
        "min": min(counts),
        "median": statistics.median(counts),
        "max": max(counts),
        "queries": sum(len(person.queries) for person in people),
    }


def describe_for_evaluation(people: Sequence[Person], task: Task) -> dict[str, Any]:
    """Return what a set offers an evaluation: people with enough items, people with times, and label shares.

    ``shots``: m -> number of people with at least m + ``QUERIES`` items. A benchmark's own answered queries count as
    items if they are answered like the history; otherwise a person needs m items and one such query. ``anchors`` and
    ``compared``: people with enough items for an anchor of ``mta bank build``, and for ``mta compare``, by default.
    """
    least, default = Run().bank.min_items, CompareSettings()

    def able(shots: int, queries: int, ask: QueryOrder) -> int:
        return sum(has_enough_items(task, person, shots, queries, ask) for person in people)

    times = [[item.time for item in person.items] for person in people]
    targets = [task.target(item) for person in people for item in person.items] if task.labelled else []
    return {
        "asked": QUERIES,
        "shots": {m: able(m, QUERIES, "last") for m in SHOTS},
        "anchors": {"items": least, "people": sum(len(person.items) >= least for person in people)},
        "compared": {
            "shots": default.shots,
            "queries": default.queries,
            "people": able(default.shots, default.queries, "next"),
        },
        "people with times": sum(None not in each for each in times),
        "labels": {label: round(targets.count(label) / len(targets), 4) for label in task.labels or () if targets},
    }
