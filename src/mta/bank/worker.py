"""Train the adapters of a bank, in this process or in a worker of a cluster."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from mta.config import Run
from mta.distributed.executor import Piece
from mta.errors import BankMismatch, Diverged
from mta.lora.batch import LoraBatch, fresh
from mta.lora.layers import Shared
from mta.model.base import BaseModel
from mta.system.progress import OnStep, Step
from mta.training.checkpoint import Checkpoint
from mta.training.scoring import mean_nll
from mta.training.trainer import Job, train_loras


@dataclass(frozen=True, slots=True)
class LoraPiece(Piece):
    """LoRAs that are trained together: the task LoRA (stage 0), or some anchors' (stage 1).

    Never split: a bank needs all its LoRAs, so a failing one is not isolated.
    """

    name: str  # of the files of this piece
    stage: Literal["task LoRA", "anchors"]
    jobs: tuple[Job, ...]
    tokens_per_batch: int
    start: LoraBatch | None = None  # none: from fresh LoRAs

    def __len__(self) -> int:
        return len(self.jobs)


@dataclass(frozen=True, slots=True)
class HeldOutPiece(Piece):
    """Held-out items, and the task LoRA that they are scored with."""

    job: Job
    task_lora: LoraBatch
    tokens_per_batch: int

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class BankWorker:
    """A base, the settings, and the task LoRA to train over, if there is one.

    ``checkpoint`` returns the checkpoint of a piece by its name. Without it, an interrupted piece starts anew.
    """

    base: BaseModel
    run: Run
    task_lora: LoraBatch | None = None
    checkpoint: Callable[[str], Checkpoint] | None = None
    on_step: OnStep | None = None

    @property
    def opener(self) -> BankOpener:
        """What opens the same base, and task LoRA, in another process; there, pieces have no checkpoints."""
        task_lora = self.task_lora and self.task_lora.to(torch.device("cpu"))
        return BankOpener(self.base.as_loaded(self.run), self.base.fingerprint, task_lora)


@dataclass(frozen=True, slots=True)
class BankOpener:
    """Opens a ``BankWorker`` with the base that ``run`` names. Raises BankMismatch for another one, and load errors."""

    run: Run
    fingerprint: str
    task_lora: LoraBatch | None

    def __call__(self) -> BankWorker:
        base = BaseModel.of(self.run, self._check)
        return BankWorker(base, self.run, self.task_lora and self.task_lora.to(base.device))

    def _check(self, fingerprint: str) -> None:
        if fingerprint != self.fingerprint:
            raise BankMismatch(
                f"a worker found base {self.run.base!r} with sha256 {fingerprint[:8]}…, expected "
                f"{self.fingerprint[:8]}…",
                hint="Give workers the same base: a hub id, an asset, or a folder on a shared disk.",
            )


def train_piece(worker: BankWorker, piece: LoraPiece) -> LoraBatch:
    """Train one LoRA per job over the frozen task LoRA, if there is one.

    Source: arXiv:2511.20072, stage 1; stage 0 is our choice. Raises Diverged as soon as a loss is not finite.
    """
    base, run, stage = worker.base, worker.run, piece.stage
    settings = run.bank if stage == "anchors" else run.task_lora
    same = stage == "anchors" and run.bank.start == "same"  # all anchors start from one A
    keys = ["bank" if same else job.key for job in piece.jobs]
    lora = settings.lora
    start = piece.start or fresh(base.targets, lora.rank, lora.scale, run.seed, keys, base.master_dtype)
    checkpoint = worker.checkpoint(piece.name) if worker.checkpoint else None

    def check(finite: bool, what: str) -> None:
        if not finite:
            hint = f"Lower {'bank' if stage == 'anchors' else 'task_lora'}.training.lr."
            raise Diverged(f"training of the {stage} diverged: {what}, expected finite numbers", hint=hint)

    def on_step(step: Step) -> None:
        check(step.loss is None or math.isfinite(step.loss), f"the mean loss of step {step.step} is {step.loss}")
        if worker.on_step:
            worker.on_step(stage, step)

    try:
        trained = train_loras(
            base,
            piece.jobs,
            start,
            settings.training,
            frozen=[Shared(worker.task_lora.to(base.dtype))] if worker.task_lora else [],
            seed=run.seed,
            tokens_per_batch=piece.tokens_per_batch,
            checkpoint=checkpoint,
            on_step=on_step,
        )
        finite = all(bool(factor.isfinite().all()) for pair in trained.factors.values() for factor in pair)
        check(finite, "trained factors are not finite")
    except Diverged:
        if checkpoint:  # it may hold diverged parameters
            checkpoint.remove()
        raise
    return trained.to(torch.device("cpu"))  # a cluster's driver may have no GPU


def score_piece(worker: BankWorker, piece: HeldOutPiece) -> float:
    """Return the loss of the items per target token."""
    over = [Shared(piece.task_lora.to(worker.base.device, worker.base.dtype))]
    return mean_nll(worker.base, [piece.job], over, tokens_per_batch=piece.tokens_per_batch)[0]
