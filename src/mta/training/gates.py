"""The gradient of people's log-likelihood in the coefficients of a merge: one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mta.lora.batch import LoraBatch
from mta.lora.layers import Adapters, Gated
from mta.model.base import BaseModel
from mta.training.trainer import Job, gradient


class GateGradients(NamedTuple):
    """``gradients`` (U, N) or (U, G, N) of the log-likelihoods ``loglik`` (U,) of U jobs; both float64, on the CPU."""

    gradients: Tensor
    loglik: Tensor


def gate_gradients(
    base: BaseModel,
    jobs: Sequence[Job],
    bank: LoraBatch,
    at: Tensor,
    pooled: Sequence[Adapters] = (),
    groups: Sequence[int] = (),
    *,
    tokens_per_batch: int = 2048,
) -> GateGradients:
    """Return d log p(examples of a job) / d w for all N anchors at once, at the coefficients ``at``.

    log p sums over the target tokens of all examples of a job. Shapes: at (U, N) or, the same for all jobs, (N,).
    ``groups`` gives the number of each adapted layer's group; each of the G groups then has its own coefficients, and
    ``at`` may be (U, G, N) or (G, N). ``pooled`` adapters are applied too.
    Source: our choice; the gates are those of ``Gated``.
    """
    layers = torch.tensor(groups, device=base.device)
    shape = (len(jobs), max(groups) + 1, len(bank)) if groups else (len(jobs), len(bank))
    rows = at if at.ndim == len(shape) else at.expand(shape)

    def adapters(parameters: Mapping[str, Tensor], _: Tensor) -> Gated:
        w = parameters["w"]
        return Gated(bank, w[:, layers] if groups else w)

    found, loglik = gradient(base, jobs, {"w": rows}, adapters, frozen=pooled, tokens_per_batch=tokens_per_batch)
    return GateGradients(found["w"].double(), loglik.double())
