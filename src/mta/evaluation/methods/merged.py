"""MTA and its parts: one LoRA per person, stage 2 alone, and stage 2 with the stack on top."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from mta.config import Lora, MergeSettings, StackSettings, Training
from mta.data.tasks.task import Task
from mta.evaluation.methods.method import Method, answer
from mta.evaluation.metrics import Answers
from mta.evaluation.protocol import Outcome, TestBatch
from mta.lora.layers import Adapters, PerPerson
from mta.personalize.merge import Merge, can_merge, merge_adapters
from mta.personalize.policies import policy_of
from mta.personalize.stages import adapt
from mta.system.device import clock
from mta.training.plan import parameters_of

MTA_PAPER = "https://arxiv.org/abs/2511.20072"


class MergeMethod(Method):
    """A method with its own ``merge``, or that of the run; it fits the tasks and banks that its merge fits."""

    if TYPE_CHECKING:  # a field of the subclasses: their order is part of the digest
        merge: MergeSettings | None

    def fits(self, task: Task, anchors: int, calibrated: bool) -> bool:
        return self.merge is None or can_merge(self.merge, anchors, task.labelled, calibrated)


class OneLora(Method):
    """One LoRA per person, trained on the shots over the task LoRA: OPPU at rank 8, "adapt only" at the stack's rank.

    Without ``training``, the training settings of the run's stack are used.
    OPPU's published code trains person i on people 0 to i; here each person is trained on their own shots only.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2402.04401"
    seeded: ClassVar[bool] = True
    method: Literal["one-lora"] = "one-lora"
    name: str = "OPPU"
    lora: Lora = Lora()
    training: Training | None = None

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        return adapted(batch, self.name, self.lora, self.training or batch.run.stack.training, seed)


class Merged(MergeMethod):
    """Stage 2 alone: a merge of the bank. Only anchor numbers and coefficients are stored."""

    paper: ClassVar[str] = MTA_PAPER
    method: Literal["merge"] = "merge"
    name: str = "merge only"
    merge: MergeSettings | None = None

    @property
    def seeded(self) -> bool:
        return self.merge is None or (self.merge.policy != "auto" and policy_of(self.merge).learns is not None)

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        return answered(batch, *batch.merge(batch.merge_settings(self.merge), seed))


class MergeThenAdapt(MergeMethod):
    """MTA: stage 2, then the stack on top of it."""

    paper: ClassVar[str] = MTA_PAPER
    seeded: ClassVar[bool] = True
    method: Literal["mta"] = "mta"
    name: str = "MTA"
    merge: MergeSettings | None = None
    stack: StackSettings | None = None

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        settings = batch.merge_settings(self.merge)
        stack = batch.stack_settings(self.stack, settings)
        if not stack.enabled:
            return answered(batch, *batch.merge(settings, seed))
        return adapted(batch, self.name, stack.lora, stack.training, seed, settings)


def adapted(
    batch: TestBatch,
    stage: str,
    lora: Lora,
    training: Training,
    seed: int,
    settings: MergeSettings | None = None,
    as_adapters: Callable[[Merge], Sequence[Adapters]] | None = None,
) -> Outcome:
    """Train one LoRA per person over the task LoRA and, with ``settings``, their merge, and answer the queries.

    Cohorts that fit the memory are trained and asked one after another. ``stage`` names the steps of the training.
    ``as_adapters`` computes the merges' adapters in another way than ``merge_adapters``.
    """
    merge, seconds = batch.merge(settings, seed) if settings else (None, 0.0)
    base, on_step = batch.base, batch.context.on_step
    numbers = parameters_of(base, lora)
    plan = batch.plan(numbers, settings)
    tokens, report = plan.tokens_per_batch, partial(on_step, stage) if on_step else None
    answers: list[Answers] = []
    for cohort in plan.cohorts:
        start = clock(batch.base.device)
        frozen: list[Adapters] = list(batch.bank.task_adapters)
        if merge:
            own = merge.select(cohort)
            frozen += as_adapters(own) if as_adapters else merge_adapters(batch.bank, own)
        jobs = [batch.jobs[i] for i in cohort]
        stacks = adapt(base, jobs, frozen, lora, training, seed=seed, tokens_per_batch=tokens, on_step=report)
        seconds += clock(batch.base.device) - start
        answers += answer(batch, cohort, [*frozen, PerPerson(stacks)])
    return Outcome(answers, seconds, 4.0 * numbers + (bytes_of(merge) if merge else 0.0), merge)


def answered(batch: TestBatch, merge: Merge, seconds: float) -> Outcome:
    """Answer the batch's queries with everybody's merge over the task LoRA."""
    answers: list[Answers] = []
    known = MergeSettings(policy="posterior", k=merge.ids.shape[1])  # nothing is left to compute
    for cohort in batch.plan(1, known).cohorts:
        start = clock(batch.base.device)
        merged = merge_adapters(batch.bank, merge.select(cohort))
        seconds += clock(batch.base.device) - start
        answers += answer(batch, cohort, [*batch.bank.task_adapters, *merged])
    return Outcome(answers, seconds, bytes_of(merge), merge)


def bytes_of(merge: Merge) -> float:
    """Return the mean bytes of a person's merge as JSON: anchors, coefficients, and gradients.

    Coefficients by layer are counted once for each group of layers, without the anchors whose coefficient is 0. The
    other fields of a state are the same for every method.
    """

    def one(u: int) -> int:
        ids, w = merge.ids[u], merge.w[u]
        if w.ndim == 2:
            return len(json.dumps([[ids[row != 0].tolist(), row[row != 0].tolist()] for row in torch.unique(w, dim=0)]))
        gradients = [part[u].tolist() for part in merge.gradients] if merge.gradients else []
        return len(json.dumps([ids.tolist(), w.tolist(), *gradients]))

    return fmean(map(one, range(len(merge.ids))))
