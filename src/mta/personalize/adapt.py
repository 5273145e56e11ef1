"""Stage 3: the stack, an ultra-low-rank LoRA per person over the frozen task and merged factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mta.config import Lora, Training
from mta.lora.batch import LoraBatch, fresh
from mta.lora.layers import Adapters
from mta.model.base import BaseModel
from mta.training.trainer import Job, train_loras


def adapt(
    base: BaseModel,
    jobs: Sequence[Job],
    frozen: Sequence[Adapters],
    lora: Lora,
    training: Training,
    *,
    start: LoraBatch | None = None,
    seed: int = 0,
    **how: Any,
) -> LoraBatch:
    """Train one LoRA per person on their shots; U jobs -> a batch of U.

    ``frozen`` is what the person already has: the task LoRA and their merge (indexed by job). With rank 1 this is MTA's
    stack; over the task LoRA alone it is OPPU, at any rank. Stacks begin from ``start``, or from a hash of (seed, job's
    key, layer).
    Source: arXiv:2511.20072, stage 3.
    """
    keys = [job.key for job in jobs]
    start = start or fresh(base.targets, lora.rank, lora.scale, seed, keys, base.master_dtype)
    return train_loras(base, jobs, start, training, frozen=frozen, seed=seed, **how)
