"""Baselines that ignore the person, or use only the person's most common answer."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Literal

from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.evaluation.methods.method import Method, Outcome, answer, register
from mta.evaluation.metrics import Answers
from mta.evaluation.protocol import Panel


class _Constant(Method):
    """A constant answer without a model, for tasks with labels."""

    of_bank: ClassVar[bool] = False

    def fits(self, task: Task, anchors: int) -> bool:
        return task.labelled


@register
class GlobalConstant(_Constant):
    """The same answer for everybody: the most frequent label, or the median rating, of the task people.

    If the panel does not know these people, the labels of all shots are used.
    """

    method: Literal["global-constant"] = "global-constant"
    name: str = "global constant"

    def run(self, panel: Panel, seed: int) -> Outcome:
        label = _constant(panel.task, panel.pool or panel.people)
        return Outcome([Answers([label] * len(items)) for items in panel.queries], 0.0, 0.0)


@register
class OwnConstant(_Constant):
    """The median rating or the most frequent label of the person's shots."""

    method: Literal["own-constant"] = "own-constant"
    name: str = "own constant"

    def run(self, panel: Panel, seed: int) -> Outcome:
        own = [_constant(panel.task, [person]) for person in panel.people]
        return Outcome([Answers([label] * len(items)) for label, items in zip(own, panel.queries)], 0.0, 1.0)


@register
class Base(Method):
    """The base model without adapters."""

    of_bank: ClassVar[bool] = False
    method: Literal["base"] = "base"
    name: str = "base"

    def run(self, panel: Panel, seed: int) -> Outcome:
        return Outcome(answer(panel, range(len(panel.people)), []), 0.0, 0.0)


@register
class TaskLora(Method):
    """The pooled model: the strongest method that does not personalize."""

    paper: ClassVar[str] = "https://github.com/TamSiuhin/OPPU/issues/4"
    method: Literal["task-lora"] = "task-lora"
    name: str = "task LoRA"

    def run(self, panel: Panel, seed: int) -> Outcome:
        return Outcome(answer(panel, range(len(panel.people)), panel.bank.pooled), 0.0, 0.0)


def _constant(task: Task, people: Sequence[Person]) -> str:
    targets = [task.target(item) for person in people for item in person.items]
    if task.metric == "mae":
        middle = statistics.median_low([float(target) for target in targets])
        return min(task.labels or (), key=lambda label: abs(float(label) - middle))
    return Counter(targets).most_common(1)[0][0]
