"""The methods that are compared. Each gets the panel's shots and answers the panel's queries."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from mta.adapt import adapt
from mta.config import Lora, MergeSettings, StackSettings, Training
from mta.evaluation.metrics import Answers, from_scores
from mta.evaluation.protocol import Panel
from mta.fuse import Merge, merged
from mta.generate import generate
from mta.history import Item
from mta.lora.layers import Adapters, PerPerson
from mta.score import label_scores
from mta.tasks.task import Task


@dataclass(frozen=True, slots=True)
class Outcome:
    """Answers for everybody, the seconds of preparing them (without answering), and bytes kept per person."""

    answers: list[Answers]
    seconds: float
    bytes_per_person: float
    merge: Merge | None = None


class Method(Protocol):
    """One row of the table."""

    @property
    def name(self) -> str:
        """What the row is called."""

    @property
    def seeded(self) -> bool:
        """Whether the seed can change anything: stacks start from it, and learned coefficients draw their batches."""

    def run(self, panel: Panel, seed: int) -> Outcome:
        """Learn from the shots and answer the queries."""


@dataclass(frozen=True, slots=True)
class GlobalConstant:
    """The same answer for everybody: the most frequent label (median for ratings) of everybody's shots."""

    name: str = "global constant"
    seeded: bool = False

    def run(self, panel: Panel, seed: int) -> Outcome:
        shots = [target for theirs in _targets(panel) for target in theirs]
        answer = _constant(panel.bank.task, shots)
        return Outcome([Answers([answer] * len(items)) for items in panel.queries], 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class OwnConstant:
    """A person's own median (ratings) or majority of the shots."""

    name: str = "own constant"
    seeded: bool = False

    def run(self, panel: Panel, seed: int) -> Outcome:
        own = [_constant(panel.bank.task, theirs) for theirs in _targets(panel)]
        return Outcome([Answers([a] * len(items)) for a, items in zip(own, panel.queries)], 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Base:
    """The untouched base model."""

    name: str = "base"
    seeded: bool = False

    def run(self, panel: Panel, seed: int) -> Outcome:
        return Outcome(_answer(panel, panel.queries, []), 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class TaskLora:
    """The pooled model: the strongest method that knows nobody."""

    name: str = "task LoRA"
    seeded: bool = False

    def run(self, panel: Panel, seed: int) -> Outcome:
        return Outcome(_answer(panel, panel.queries, panel.bank.pooled), 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Merged:
    """Stage 2 alone: a merge of the bank, nothing kept but anchor numbers and coefficients."""

    name: str
    settings: MergeSettings

    @property
    def seeded(self) -> bool:
        """Whether coefficients are learned, from batches drawn by the seed."""
        return self.settings.policy == "learned"

    def run(self, panel: Panel, seed: int) -> Outcome:
        merge, seconds = panel.merge(self.settings, seed)
        answers: list[Answers] = []
        for cohort in panel.plan(1, self.settings).cohorts:
            adapters = [*panel.bank.pooled, merged(panel.bank, merge.select(cohort), self.settings)]
            answers += _answer(panel, [panel.queries[i] for i in cohort], adapters)
        return Outcome(answers, seconds, _bytes(merge), merge)


@dataclass(frozen=True, slots=True)
class OneLora:
    """One LoRA per person from the shots, over the task LoRA: OPPU at rank 8, "adapt only" with the stack's rank."""

    name: str
    lora: Lora
    training: Training
    seeded: bool = True

    def run(self, panel: Panel, seed: int) -> Outcome:
        return _adapt(panel, None, None, self.lora, self.training, seed, self.name)


@dataclass(frozen=True, slots=True)
class MergeThenAdapt:
    """MTA: stage 2, then the stack on top of it."""

    name: str
    settings: MergeSettings
    stack: StackSettings
    seeded: bool = True

    def run(self, panel: Panel, seed: int) -> Outcome:
        merge, seconds = panel.merge(self.settings, seed)
        found = _adapt(panel, merge, self.settings, self.stack.lora, self.stack.training, seed, self.name)
        return replace(found, seconds=seconds + found.seconds)


def _targets(panel: Panel) -> list[list[str]]:
    return [[panel.bank.task.target(item) for item in person.items] for person in panel.people]


def _constant(task: Task, targets: Sequence[str]) -> str:
    if task.metric == "mae":
        middle = statistics.median_low([float(target) for target in targets])
        return min(task.labels or (), key=lambda label: abs(float(label) - middle))
    return Counter(targets).most_common(1)[0][0]


def _answer(panel: Panel, queries: Sequence[Sequence[Item]], adapters: Sequence[Adapters]) -> list[Answers]:
    """Label scores where there are labels, else greedy texts; ``adapters`` are indexed as ``queries`` are."""
    task, base = panel.bank.task, panel.base
    if task.labels:
        return [from_scores(task, scores) for scores in label_scores(base, task, queries, adapters)]
    rows = [(person, item) for person, items in enumerate(queries) for item in items]
    prompts = [base.prompts.prompt(task, item, reserve=64).tokens for _, item in rows]
    texts = [base.prompts.decode(t) for t in generate(base, prompts, [p for p, _ in rows], adapters)]
    return [Answers([t for t, (p, _) in zip(texts, rows) if p == person]) for person in range(len(queries))]


def _adapt(
    panel: Panel,
    merge: Merge | None,
    settings: MergeSettings | None,
    lora: Lora,
    training: Training,
    seed: int,
    stage: str,
) -> Outcome:
    """One LoRA per person over the task LoRA and, where there is one, their merge.

    In cohorts that fit the memory: each is trained, answers, and goes.
    """
    base, jobs = panel.base, panel.jobs
    numbers = lora.rank * sum(d + o for d, o in base.targets.values())
    plan = panel.plan(numbers, settings)
    answers: list[Answers] = []
    seconds = 0.0
    for cohort in plan.cohorts:
        frozen: list[Adapters] = list(panel.bank.pooled)
        if merge and settings:
            frozen.append(merged(panel.bank, merge.select(cohort), settings))
        start = time.monotonic()
        found = adapt(
            base,
            [jobs[i] for i in cohort],
            frozen,
            lora,
            training,
            seed=seed,
            tokens_per_batch=plan.tokens_per_batch,
            on_step=partial(panel.on_step, stage) if panel.on_step else None,
        )
        seconds += time.monotonic() - start
        answers += _answer(panel, [panel.queries[i] for i in cohort], [*frozen, PerPerson(found)])
    return Outcome(answers, seconds, _bytes(merge) + 4 * numbers, merge)


def _bytes(merge: Merge | None) -> float:
    """What has to be kept of one person's merge: anchor numbers and coefficients; trained numbers are float32."""
    return 0 if merge is None else len(json.dumps([merge.ids[0].tolist(), merge.w[0].tolist()]))
