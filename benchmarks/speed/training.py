"""Our side of the rows about training: cohorts as ``mta personalize`` plans them, and gradients to compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Unpack

import torch
from torch import Tensor

from benchmarks.speed.data import BASE
from benchmarks.speed.processor import need
from mta.config import Lora, Training
from mta.lora.batch import Factors, LoraBatch, concatenate, fresh
from mta.lora.layers import Adapters, PerPerson, Renumbered, Shared
from mta.lora.merge import merge_exact
from mta.model.base import BaseModel
from mta.model.footprint import ParameterCounts
from mta.system.progress import Step
from mta.training.plan import Plan, plan_cohorts
from mta.training.trainer import Job, Passes, train_loras

ANCHORS, K = 50, 4  # of the bank below a stack
_STEEP = 1e6  # AdamW with so large an eps, and as large a rate, subtracts the gradient itself


class Unequal(Exception):
    """Two ways of the same work gave different results: there is nothing to time."""


@lru_cache(maxsize=2)
def base_of(dtype: str) -> BaseModel:
    """SmolLM2-135M in ``dtype`` with everything this library does to it. Raises Absent."""
    need(dtype)
    return BaseModel.load(BASE, dtype, "cpu")


@dataclass(frozen=True, slots=True)
class Cohort:
    """People to be trained together: their jobs, adapters to start from, and what is frozen below these.

    ``pooled`` is one adapter for all, ``merges`` one for each; ``memory`` in bytes bounds activations and adapters.
    """

    base: BaseModel
    jobs: Sequence[Job]
    start: LoraBatch
    training: Training
    memory: int
    pooled: LoraBatch | None = None
    merges: LoraBatch | None = None

    def some(self, people: Sequence[int]) -> Cohort:
        """The same with only these people, by their numbers."""
        chosen = list(people)
        merges = None if self.merges is None else self.merges.select(chosen)
        jobs = [self.jobs[n] for n in chosen]
        return replace(self, jobs=jobs, start=self.start.select(chosen), merges=merges)

    def first(self, people: int) -> Cohort:
        """The same with at most so many people."""
        return self.some(range(min(people, len(self.jobs))))

    def typical(self, people: int) -> Cohort:
        """So many people, from short to long texts, standing for all."""
        order = sorted(range(len(self.jobs)), key=lambda n: tokens_of(self.jobs[n]))
        return self.some([order[(2 * n + 1) * len(order) // (2 * people)] for n in range(people)])

    def each(self) -> Iterator[Cohort]:
        """Every person alone."""
        return (self.some([n]) for n in range(len(self.jobs)))

    @property
    def tokens(self) -> int:
        """Of all examples, as they are written out."""
        return sum(tokens_of(job) for job in self.jobs)

    def plan(self) -> Plan:
        """The plan from the memory, in which frozen adapters count as for ``mta personalize``."""
        below = ParameterCounts(frozen=_numbers(self.merges), task_lora=_numbers(self.pooled))
        return plan_cohorts(self.base, self.jobs, _numbers(self.start), self.memory, below=below)

    def train(self, **how: Unpack[Passes]) -> LoraBatch:
        """All of them, as planned from the memory; keywords as in ``train_loras``."""
        plan, found = self.plan(), []
        for members in plan.cohorts:
            chosen = list(members)
            below = [Renumbered(one, torch.tensor(chosen)) for one in self._frozen()]
            jobs, start = [self.jobs[n] for n in chosen], self.start.select(chosen)
            passes: Passes = {"tokens_per_batch": plan.tokens_per_batch, **how}
            found.append(train_loras(self.base, jobs, start, self.training, frozen=below, **passes))
        return found[0] if len(found) == 1 else concatenate(found)

    def gradient(self) -> tuple[float, LoraBatch]:
        """Mean loss of these people and the gradient of each adapter on all examples of its job."""
        losses: list[Step] = []
        steps = Training(lr=_STEEP, eps=_STEEP, steps=1, batch_size=1024, beta1=0.0, beta2=0.0, clip=1e9)
        after = replace(self, training=steps).train(on_step=losses.append).to(torch.device("cpu"))
        before = self.start.tensors()
        moved = {name: before[name] - tensor for name, tensor in after.tensors().items()}
        return float(losses[0].loss or 0.0), LoraBatch.of_tensors(moved, self.start.scale)

    def _frozen(self) -> list[Adapters]:
        shared: list[Adapters] = [] if self.pooled is None else [Shared(self.pooled)]
        return shared if self.merges is None else [*shared, PerPerson(self.merges)]


def _numbers(adapters: LoraBatch | None) -> int:
    """Numbers of one adapter of a batch."""
    return 0 if adapters is None else sum(tensor[0].numel() for tensor in adapters.parts().values())


def tokens_of(job: Job) -> int:
    """Of a job's examples."""
    return sum(len(example.tokens) for example in job.examples)


def oppu(base: BaseModel, jobs: Sequence[Job], training: Training, memory: int) -> Cohort:
    """A LoRA of rank 8 for each person over the base alone."""
    lora = Lora()
    start = fresh(base.targets, lora.rank, lora.scale, 0, [job.key for job in jobs], base.master_dtype)
    return Cohort(base, jobs, start.to(base.device), training, memory)


def stack(
    base: BaseModel, jobs: Sequence[Job], training: Training, memory: int, bank: LoraBatch | None = None
) -> Cohort:
    """MTA's stage 3: a LoRA of rank 1 for each person over a task LoRA and the exact merge of K anchors of ``bank``.

    By default, the bank has 50 random anchors.
    """
    lora = Lora(rank=1)
    start = fresh(base.targets, lora.rank, lora.scale, 0, [job.key for job in jobs], base.master_dtype)
    bank = random_bank(base, ANCHORS) if bank is None else bank
    draw = torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randperm(len(bank), generator=draw)[:K] for _ in jobs])
    merges = merge_exact(bank, ids, torch.full(ids.shape, 1 / K))
    return Cohort(base, jobs, start.to(base.device), training, memory, task_lora(base), merges)


def task_lora(base: BaseModel) -> LoraBatch:
    """A frozen adapter of rank 8 for everybody, made up: times do not depend on its values."""
    return small(fresh(base.targets, 8, 2.0, 3, ["task"]).to(base.device), 3).to(base.dtype)


def random_bank(base: BaseModel, anchors: int) -> LoraBatch:
    """Random anchors of rank 8 on the base's device."""
    return small(fresh(base.targets, 8, 2.0, 1, ["bank"] * anchors).to(base.device), 1).to(base.dtype)


def small(batch: LoraBatch, seed: int) -> LoraBatch:
    """The same A with a small random B, so that every factor has a gradient."""
    device = next(iter(batch.factors.values())).b.device
    draw = torch.Generator(device).manual_seed(seed)

    def drawn(b: Tensor) -> Tensor:
        return 0.01 * torch.randn(b.shape, generator=draw, device=device).to(b)

    return LoraBatch({name: Factors(a, drawn(b)) for name, (a, b) in batch.factors.items()}, batch.scale)


def apart(found: LoraBatch, expected: LoraBatch) -> float:
    """Largest relative difference over the adapters: norm of the difference over the norm of what is expected."""
    ours, theirs = flat(found), flat(expected)
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())


def flat(batch: LoraBatch) -> Tensor:
    """All numbers of each adapter as one row, in float64."""
    return torch.cat([tensor.flatten(1).double().cpu() for tensor in batch.tensors().values()], 1)


def agreed(difference: float, dtype: str) -> float:
    """The difference, if it is one of rounding. Raises Unequal."""
    allowed = 0.15 if dtype == "bfloat16" else 1e-2
    if not difference <= allowed:
        raise Unequal(f"results differ by {difference:.3g}, {allowed} is allowed in {dtype}")
    return difference
