"""Where the factors of a bank are trained: over a base at hand here, or made again by a worker elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from mta.bank.task_lora import train_task_lora
from mta.config import Run, parse_size
from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.errors import BankMismatch, Diverged
from mta.lora.batch import LoraBatch, fresh
from mta.lora.layers import Shared
from mta.model.base import BaseModel
from mta.training.checkpoint import Checkpoint
from mta.training.trainer import Job, OnStep, Step, train_loras


@dataclass(frozen=True, slots=True)
class Bench:
    """A base, the settings, and the task LoRA to train over, where there is one yet.

    ``checkpoint`` gives the checkpoint of a piece by its name; without, a stopped piece is trained again as a whole.
    """

    base: BaseModel
    run: Run
    pooled: LoraBatch | None = None
    checkpoint: Callable[[str], Checkpoint] | None = None
    on_step: OnStep | None = None


@dataclass(frozen=True, slots=True)
class BenchCopies:
    """Makes the same bench in another process: called there, it loads the base. ``run`` names it as it was loaded."""

    run: Run
    fingerprint: str
    pooled: LoraBatch | None = None

    def __call__(self) -> Bench:
        """Raises BankMismatch if another base lies there, and what loading one raises."""
        base = BaseModel.of(self.run, self._check)
        return Bench(base, self.run, self.pooled and self.pooled.to(base.device))

    def _check(self, found: str) -> None:
        if found != self.fingerprint:
            raise BankMismatch(
                f"a worker found base {self.run.base!r} with sha256 {found[:8]}…, expected {self.fingerprint[:8]}…",
                hint="Give workers the same base: a hub id, an asset, or a folder on a shared disk.",
            )


@dataclass(frozen=True, slots=True)
class Pool:
    """Stage 0 as one piece of work."""

    task: Task
    people: tuple[Person, ...]
    name: str = "task"

    def __len__(self) -> int:
        return 1

    def halves(self) -> Sequence[Pool]:
        """One LoRA cannot be parted."""
        return ()


@dataclass(frozen=True, slots=True)
class Anchors:
    """Anchors that are trained together (stage 1)."""

    number: int
    jobs: tuple[Job, ...]
    tokens_per_batch: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"anchors-{self.number:03}"

    def __len__(self) -> int:
        return len(self.jobs)

    def halves(self) -> Sequence[Anchors]:
        """Every anchor is needed: one that fails is no reason to go on without it."""
        return ()


def train_pool(bench: Bench, piece: Pool) -> LoraBatch:
    """Stage 0: the task LoRA, a batch of one. Raises Diverged."""
    settings = bench.run.task_lora
    with _checked(bench, piece.name) as checkpoint:
        trained = train_task_lora(
            bench.base,
            piece.task,
            piece.people,
            settings,
            seed=bench.run.seed,
            memory=parse_size(bench.run.memory),
            checkpoint=checkpoint,
            on_step=_watched("task LoRA", bench.on_step),
        )
        return _finite("task LoRA", trained)


def train_anchors(bench: Bench, piece: Anchors) -> LoraBatch:
    """Stage 1 for some anchors: one meta-LoRA for each, over the frozen task LoRA. Raises Diverged."""
    base = bench.base
    with _checked(bench, piece.name) as checkpoint:
        trained = train_loras(
            base,
            piece.jobs,
            anchor_start(base, bench.run, piece.jobs),
            bench.run.bank.training,
            frozen=[Shared(bench.pooled.to(base.dtype))] if bench.pooled else [],
            seed=bench.run.seed,
            tokens_per_batch=piece.tokens_per_batch,
            checkpoint=checkpoint,
            on_step=_watched("anchors", bench.on_step),
        )
        return _finite("anchors", trained)


@contextmanager
def _checked(bench: Bench, name: str) -> Iterator[Checkpoint | None]:
    """Yield the checkpoint of a piece. Remove the checkpoint if training diverges: it may hold diverged parameters."""
    checkpoint = bench.checkpoint(name) if bench.checkpoint else None
    try:
        yield checkpoint
    except Diverged:
        if checkpoint:
            checkpoint.remove()
        raise


def _watched(stage: str, report: OnStep | None) -> Callable[[Step], None]:
    """Return a callback that reports steps, and stops the training at the first loss that is not finite."""

    def watch(step: Step) -> None:
        if step.loss is not None and not math.isfinite(step.loss):
            raise _diverged(stage, f"the mean loss of step {step.step} is {step.loss}")
        if report:
            report(stage, step)

    return watch


def _finite(stage: str, trained: LoraBatch) -> LoraBatch:
    """Return the factors. Raises Diverged if one of their numbers is not finite."""
    if not all(bool(factor.isfinite().all()) for pair in trained.factors.values() for factor in pair):
        raise _diverged(stage, "trained factors are not finite")
    return trained


def _diverged(stage: str, what: str) -> Diverged:
    lr = "task_lora.training.lr" if stage == "task LoRA" else "bank.training.lr"
    return Diverged(f"training of the {stage} diverged: {what}, expected finite numbers", hint=f"Lower {lr}.")


def anchor_start(base: BaseModel, run: Run, jobs: Sequence[Job]) -> LoraBatch:
    """What anchors are trained from: one A for all of them, or each its own; B is zero."""
    lora, same = run.bank.lora, run.bank.start == "same"
    keys = ["bank"] if same else [job.key for job in jobs]
    start = fresh(base.targets, lora.rank, lora.scale, run.seed, keys, base.master_dtype)
    return start.select([0] * len(jobs)) if same else start
