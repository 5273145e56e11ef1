"""A person's shots as training examples, and what one pass over them gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mta.data.history import Person
from mta.data.tasks.prompt import Example
from mta.data.tasks.task import Task
from mta.model.base import BaseModel
from mta.training.trainer import Job


@dataclass(frozen=True, slots=True)
class ShotsJob(Job):
    """A person's shots as a job to train an adapter on."""

    alternatives: Sequence[Sequence[Example]] = ()  # each example's prompt with every label, scored but not trained on


def shots_of(base: BaseModel, task: Task, person: Person, alternatives: bool = True, known_items: int = 0) -> ShotsJob:
    """Return a person's items as training examples, with ``alternatives`` if the task has labels.

    Only policies that need labels read alternatives, which take most of the tokenizer's time. The job's key is the
    digest of the items, not the id: a hash of the key must not confirm a guessed id. Raises DataError for an item that
    is not one of the task, or does not fit the model's tokens; ``known_items`` is the number of earlier items that the
    person has, and that errors count too.
    """
    base.prompts.check(task, ((f"item {n}", item) for n, item in enumerate(person.items, known_items + 1)))
    examples = [base.prompts.example(task, item) for item in person.items]
    labels = [task.labels_of(item) for item in person.items]
    if not alternatives or not all(labels):
        return ShotsJob(person.digest(), examples)
    others = [base.prompts.examples(task, item, own or ()) for item, own in zip(person.items, labels)]
    return ShotsJob(person.digest(), examples, alternatives=others)


class ShotGradients(NamedTuple):
    """The gradient of each person's log-likelihood in the coefficients of all anchors, at a calibration's mu.

    Shapes: sums (U, N) and the log-likelihoods themselves, loglik (U,), summed over a person's shots, float64; shots
    (U,), their number.
    """

    sums: Tensor
    loglik: Tensor
    shots: Tensor

    def plus(self, more: ShotGradients) -> ShotGradients:
        """Return the gradients of both parts of each person's shots together."""
        return ShotGradients(self.sums + more.sums, self.loglik + more.loglik, self.shots + more.shots)
