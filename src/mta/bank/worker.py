"""Train the adapters of a bank, in this process or in a worker of a cluster."""

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
from mta.system.progress import OnStep, Step
from mta.training.checkpoint import Checkpoint
from mta.training.trainer import Job, train_loras


@dataclass(frozen=True, slots=True)
class BankWorker:
    """A base, the settings, and the task LoRA to train over, if there is one.

    ``checkpoint`` returns the checkpoint of a piece by its name. Without it, an interrupted piece starts anew.
    """

    base: BaseModel
    run: Run
    pooled: LoraBatch | None = None
    checkpoint: Callable[[str], Checkpoint] | None = None
    on_step: OnStep | None = None


def open_worker(run: Run, fingerprint: str, pooled: LoraBatch | None) -> BankWorker:
    """Load the base that ``run`` names and return a worker. Raises BankMismatch for another base, and load errors."""

    def check(found: str) -> None:
        if found != fingerprint:
            raise BankMismatch(
                f"a worker found base {run.base!r} with sha256 {found[:8]}…, expected {fingerprint[:8]}…",
                hint="Give workers the same base: a hub id, an asset, or a folder on a shared disk.",
            )

    base = BaseModel.of(run, check)
    return BankWorker(base, run, pooled and pooled.to(base.device))


@dataclass(frozen=True, slots=True)
class Pool:
    """Stage 0: the task LoRA, as one piece of work."""

    task: Task
    people: tuple[Person, ...]
    name: str = "task"

    def __len__(self) -> int:
        return 1

    def halves(self) -> Sequence[Pool]:
        """Return nothing: one LoRA cannot be split."""
        return ()


@dataclass(frozen=True, slots=True)
class Anchors:
    """Anchors that are trained together (stage 1)."""

    number: int
    jobs: tuple[Job, ...]
    tokens_per_batch: int

    @property
    def name(self) -> str:
        """Name of the files of this piece."""
        return f"anchors-{self.number:03}"

    def __len__(self) -> int:
        return len(self.jobs)

    def halves(self) -> Sequence[Anchors]:
        """Return nothing: a bank needs all its anchors, so a failing one is not isolated."""
        return ()


def train_pool(worker: BankWorker, piece: Pool) -> LoraBatch:
    """Stage 0: the task LoRA, a batch of one. Raises Diverged."""
    settings = worker.run.task_lora
    with _checked(worker, piece.name) as checkpoint:
        trained = train_task_lora(
            worker.base,
            piece.task,
            piece.people,
            settings,
            seed=worker.run.seed,
            memory=parse_size(worker.run.memory),
            checkpoint=checkpoint,
            on_step=_watched("task LoRA", worker.on_step),
        )
        return _finite("task LoRA", trained)


def train_anchors(worker: BankWorker, piece: Anchors) -> LoraBatch:
    """Stage 1 for some anchors: one meta-LoRA for each, over the frozen task LoRA. Raises Diverged."""
    base = worker.base
    with _checked(worker, piece.name) as checkpoint:
        trained = train_loras(
            base,
            piece.jobs,
            anchor_start(base, worker.run, piece.jobs),
            worker.run.bank.training,
            frozen=[Shared(worker.pooled.to(base.dtype))] if worker.pooled else [],
            seed=worker.run.seed,
            tokens_per_batch=piece.tokens_per_batch,
            checkpoint=checkpoint,
            on_step=_watched("anchors", worker.on_step),
        )
        return _finite("anchors", trained)


@contextmanager
def _checked(worker: BankWorker, name: str) -> Iterator[Checkpoint | None]:
    """Yield the checkpoint of a piece. Remove the checkpoint if training diverges: it may hold diverged parameters."""
    checkpoint = worker.checkpoint(name) if worker.checkpoint else None
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
    """Return the adapters that the anchors' training starts from: one A for all, or one for each; B is zero."""
    lora, same = run.bank.lora, run.bank.start == "same"
    keys = ["bank"] if same else [job.key for job in jobs]
    start = fresh(base.targets, lora.rank, lora.scale, run.seed, keys, base.master_dtype)
    return start.select([0] * len(jobs)) if same else start
