"""Baselines that ignore the person, or use only the person's most common answer."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mta.bank.calibration.info import NO_HISTORY
from mta.data.history import Person, own_fields
from mta.data.tasks.task import Task
from mta.evaluation.methods.method import Method, answer
from mta.evaluation.metrics import Answers
from mta.evaluation.protocol import Outcome, TestBatch


class _Constant(Method):
    """The same answer to all questions, without a model, for tasks with labels. Its probabilities are label shares."""

    uses_bank: ClassVar[bool] = False
    uses_other_people: ClassVar[bool] = True
    shows_history: ClassVar[bool] = False

    def fits(self, task: Task, anchors: int, calibrated: bool) -> bool:
        return task.labelled


class GlobalConstant(_Constant):
    """The shares of the labels among the task people; the answer is their median rating or most frequent label.

    If the batch does not know these people, the labels of all shots are used.
    """

    method: Literal["global-constant"] = "global-constant"
    name: str = "global constant"

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        people = batch.task_people or batch.tested or batch.people
        answers = _constant(batch.task, people, _shares(_counts(batch.task, people)))
        return Outcome([answers(len(items)) for items in batch.queries], 0.0, 0.0)


class OwnConstant(_Constant):
    """The shares of the labels among a person's shots, pulled to those of everybody; the answer is that of the shots.

    How far is chosen on the task people, or where these are not known on the tested people's shots: each item is
    predicted from the other items of its person.
    """

    method: Literal["own-constant"] = "own-constant"
    name: str = "own constant"

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        task, shots = batch.task, max(len(person.items) for person in batch.people)
        others = [person.first(shots) for person in batch.task_people] or batch.tested or batch.people
        everybody = _shares(_counts(task, batch.task_people or others))
        pull = best_pull(torch.stack([_counts(task, [person]) for person in others]), everybody)
        own = [_constant(task, [one], _pulled(_counts(task, [one]), everybody, pull)) for one in batch.people]
        answers = [answer(len(items)) for answer, items in zip(own, batch.queries)]
        return Outcome(answers, 0.0, float(len(everybody)))


class Base(Method):
    """The base model without adapters."""

    uses_bank: ClassVar[bool] = False
    method: Literal["base"] = "base"
    name: str = "base"

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        return Outcome(answer(batch, range(len(batch.people)), []), 0.0, 0.0)


class TaskLora(Method):
    """The pooled model: the strongest method that does not personalize."""

    paper: ClassVar[str] = "https://github.com/TamSiuhin/OPPU/issues/4"
    method: Literal["task-lora"] = "task-lora"
    name: str = "task LoRA"

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        return Outcome(answer(batch, range(len(batch.people)), batch.bank.task_adapters), 0.0, 0.0)


class NoHistory(TaskLora):
    """The pooled model, asked without the earlier items that the bank's prompts show."""

    shows_history: ClassVar[bool] = False
    method: Literal["no-history"] = "no-history"  # type: ignore[assignment]
    name: str = NO_HISTORY

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        plain = [tuple(replace(item, fields=dict(own_fields(item))) for item in items) for items in batch.queries]
        return super().run(replace(batch, queries=plain), seed)


def _counts(task: Task, people: Sequence[Person]) -> Tensor:
    """Return how often each label occurs in the items of people, (labels,)."""
    counts = Counter(task.target(item) for person in people for item in person.items)
    return torch.tensor([counts[label] for label in task.labels or ()], dtype=torch.float64)


def _shares(counts: Tensor) -> Tensor:
    """Return the shares of the labels, as if each had occurred once more."""
    return (counts + 1) / (counts + 1).sum()


def _pulled(counts: Tensor, everybody: Tensor, pull: float) -> Tensor:
    """Return shares (…, labels) of counts (…, labels), together with ``pull`` items that are shared as everybody's."""
    return (counts + pull * everybody) / (counts.sum(-1, keepdim=True) + pull)


def best_pull(counts: Tensor, everybody: Tensor) -> float:
    """Return the pull, a power of two, under which items of people (U, labels) are likeliest, each left out in turn."""

    def likelihood(pull: float) -> float:
        without = counts[:, None] - torch.eye(counts.shape[1], dtype=counts.dtype)  # (U, left out, labels)
        shares = _pulled(without, everybody, pull).diagonal(dim1=1, dim2=2)
        return float((counts * shares.clamp_min(1e-12).log()).sum())

    return max((2.0**n for n in range(-2, 8)), key=likelihood)


def _constant(task: Task, people: Sequence[Person], shares: Tensor) -> Callable[[int], Answers]:
    """Return a function from a number of questions to their answers: one label, and the shares of all."""
    targets = [task.target(item) for person in people for item in person.items]
    if task.metric == "mae":
        middle = statistics.median_low([float(target) for target in targets])
        label = min(task.labels or (), key=lambda label: abs(float(label) - middle))
    else:
        label = Counter(targets).most_common(1)[0][0]
    return lambda count: Answers([label] * count, shares.log().expand(count, -1))
