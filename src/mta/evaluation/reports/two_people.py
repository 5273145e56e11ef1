"""Two tested people, question by question: what they learned from, their true answers, and the models' predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, pstdev

from mta.data.history import Item
from mta.data.tasks.task import Task, is_number
from mta.evaluation.protocol import TestBatch
from mta.evaluation.reports.summary import OTHER, OURS, POOLED
from mta.evaluation.statistics import Comparison

Answer = Mapping[str, float] | str  # the probability of every label, or a text
CALLED = {POOLED: "everybody's", OURS: "their own", OTHER: "another's"}  # methods, and what their answers are called
_COMMON = 4  # questions, at least, that two people are compared by


@dataclass(frozen=True, slots=True)
class Asked:
    """A tested person: ``shots`` are what their model learned from, and their answers to these.

    ``answers`` has, for some of the methods ``CALLED``, an answer to each of the ``questions``.
    """

    place: int  # among the tested people
    id: str
    labels: tuple[str, ...]
    shots: tuple[tuple[str, str], ...]
    questions: tuple[str, ...]
    golds: tuple[str, ...]
    answers: Mapping[str, tuple[Answer, ...]]

    def error(self, method: str) -> float | None:
        """Return the mean distance of a method's expected answers from the true ones; None without numbers."""
        pairs = [(mean_of(answer), gold) for answer, gold in zip(self.answers[method], self.golds)]
        known = [abs(mean - float(gold)) for mean, gold in pairs if mean is not None]
        return fmean(known) if known else None


def mean_of(answer: Answer) -> float | None:
    """Return the expected value of an answer with numbers as labels."""
    if isinstance(answer, str) or not all(map(is_number, answer)):
        return None
    return sum(float(label) * share for label, share in answer.items())


def two_people(batch: TestBatch, comparison: Comparison) -> tuple[Asked, ...]:
    """Return the two tested people whose models differ most in content, whatever the true answers are.

    That is, by the standard deviation of what both models expect of the questions that both people were asked: two
    habits of using a scale differ by the same number everywhere. Where answers are no numbers, or few questions are the
    same, they are the first and the last.
    """
    every = [_asked(batch, comparison, u) for u in range(len(batch.people))]
    pairs = [(distance, pair) for pair in combinations(every, 2) if (distance := _distance(*pair)) is not None]
    return max(pairs, key=lambda one: one[0])[1] if pairs else tuple(every[:: max(len(every) - 1, 1)][:2])


def _distance(one: Asked, other: Asked) -> float | None:
    """Return how much two people's models differ in content."""
    mine, theirs = (dict(zip(person.questions, map(mean_of, person.answers.get(OURS, ())))) for person in (one, other))
    differences = [a - b for question, a in mine.items() if a is not None and (b := theirs.get(question)) is not None]
    return pstdev(differences) if len(differences) >= _COMMON else None


def _asked(batch: TestBatch, comparison: Comparison, u: int) -> Asked:
    task, person = batch.task, batch.people[u]
    answers = {
        name: _answers(task, comparison, name, u)
        for name in CALLED
        if name in comparison.names and comparison.row(name).answers
    }
    shots = tuple((_first(task, item), task.target(item)) for item in person.items)
    questions = tuple(_first(task, item) for item in batch.queries[u])
    return Asked(u, person.id, tuple(task.labels or ()), shots, questions, tuple(batch.golds[u]), answers)


def _answers(task: Task, comparison: Comparison, name: str, u: int) -> tuple[Answer, ...]:
    found = comparison.row(name).answers[u]
    if found.scores is None or task.labels is None:
        return tuple(found.texts)
    return tuple(dict(zip(task.labels, shares)) for shares in found.scores.double().softmax(1).tolist())


def _first(task: Task, item: Item) -> str:
    """Return the first field of an item's prompt."""
    return item.fields[task.item.inputs[0] if task.item.inputs else task.item.target]
