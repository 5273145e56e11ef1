"""Count what a set of people holds, for a summary of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from mta.config import CompareSettings, Run
from mta.data.history import Person
from mta.data.shots_and_queries import has_enough_items
from mta.data.tasks.task import Task


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
    """Return the number of people with enough items for an anchor and for ``mta compare``; times and labels."""
    least, default = Run().bank.min_items, CompareSettings()
    able = sum(has_enough_items(task, person, default.shots, default.queries, "next") for person in people)
    times = [[item.time for item in person.items] for person in people]
    targets = [task.target(item) for person in people for item in person.items] if task.labelled else []
    return {
        "anchors": {"items": least, "people": sum(len(person.items) >= least for person in people)},
        "compared": {"shots": default.shots, "queries": default.queries, "people": able},
        "people with times": sum(None not in each for each in times),
        "labels": {label: round(targets.count(label) / len(targets), 4) for label in task.labels or () if targets},
    }
