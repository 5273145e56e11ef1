"""The gradient of people's log-likelihood in the coefficients of a merge: one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from mta.lora.batch import LoraBatch
from mta.lora.layers import Adapters, Gated
from mta.model.base import BaseModel
from mta.training.packing import TOKENS
from mta.training.trainer import Job, gradient


class GateGradients(NamedTuple):
    """``gradients`` of the log-likelihoods ``loglik`` (U,) of U jobs: (U, N), or (U, L, N) with coefficients per layer.

    Both are float64, on the CPU.
    """

    gradients: Tensor
    loglik: Tensor


def gate_gradients(
    base: BaseModel,
    jobs: Sequence[Job],
    anchors: LoraBatch,
    at: Tensor,
    task_adapters: Sequence[Adapters] = (),
    *,
    tokens_per_batch: int = TOKENS,
) -> GateGradients:
    """Return d log p(examples of a job) / d w for all N anchors at once, at the coefficients ``at``.

    log p sums over the target tokens of all examples of a job. Shapes: at (U, N); (U, L, N) with coefficients per
    adapted layer, whose gradients of a group of layers add up; or, the same for all jobs, (N,). ``task_adapters`` are
    applied, too.
    Source: our choice; the gates are those of ``Gated``.
    """
    rows, is_zero = at.expand(len(jobs), -1) if at.ndim == 1 else at, not at.any()

    def adapters(parameters: Mapping[str, Tensor], _: Tensor) -> Gated:
        return Gated(anchors, parameters["w"], is_zero)

    found, loglik = gradient(base, jobs, {"w": rows}, adapters, frozen=task_adapters, tokens_per_batch=tokens_per_batch)
    return GateGradients(found["w"].double(), loglik.double())
