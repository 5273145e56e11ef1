"""The gradient of people's log-likelihood in the coefficients of a merge: one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mta.data.tasks.prompt import Example
from mta.lora.batch import LoraBatch
from mta.lora.layers import Adapters, Gated
from mta.model.base import BaseModel
from mta.training.packing import TOKENS, common_prefix
from mta.training.trainer import Job, gradient


class GateGradients(NamedTuple):
    """``gradients`` (U, N) of the log-likelihoods ``loglik`` (U,) of U jobs. Both are float64, on the CPU."""

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

    log p sums over the target tokens of all examples of a job. Shapes: at (U, N) or, the same for all jobs, (N,).
    ``task_adapters`` are applied, too.
    Source: our choice; the gates are those of ``Gated``.
    """
    rows, is_zero = at.expand(len(jobs), -1) if at.ndim == 1 else at, not at.any()

    def adapters(parameters: Mapping[str, Tensor], _: Tensor) -> Gated:
        return Gated(anchors, parameters["w"], is_zero)

    points, numbers = torch.unique(rows, dim=0, return_inverse=True)
    units, places = units_of([job.examples for job in jobs], numbers.tolist())
    jobs, rows = [Job(str(n), part) for n, (_, part) in enumerate(units)], points[[number for number, _ in units]]
    found, loglik = gradient(base, jobs, {"w": rows}, adapters, frozen=task_adapters, tokens_per_batch=tokens_per_batch)
    return GateGradients(summed(found["w"].double(), places), summed(loglik.double(), places))


def units_of(
    parts: Sequence[Sequence[Example]], points: Sequence[int]
) -> tuple[list[tuple[int, tuple[Example, ...]]], list[list[int]]]:
    """Return sets of examples whose sums of gradients give those of ``parts``, and the numbers of each part's sets.

    ``points`` are the numbers of the coefficients at which each part is computed; each set has its own. At one point,
    an example has the same gradient in everybody's items. Where people answer the same questions, each answer is a set,
    and computed once; where that takes more tokens, the parts themselves are the sets.
    """
    pairs = ((point, example) for point, part in zip(points, parts) for example in part)
    distinct = {pair: n for n, pair in enumerate(dict.fromkeys(pairs))}
    if sum(len(example.tokens) for _, example in distinct) >= sum(map(_tokens, parts)):
        return [(point, tuple(part)) for point, part in zip(points, parts)], [[n] for n in range(len(parts))]
    places = [[distinct[point, example] for example in part] for point, part in zip(points, parts)]
    return [(point, (example,)) for point, example in distinct], places


def summed(rows: Tensor, places: Sequence[Sequence[int]]) -> Tensor:
    """Return the sum of the ``rows`` at each of the ``places``."""
    return torch.stack([rows[list(of)].sum(0) for of in places])


def _tokens(part: Sequence[Example]) -> int:
    """Return the number of tokens of a part's tree."""
    ordered = sorted(example.tokens for example in part)
    return sum(map(len, ordered)) - sum(common_prefix(*pair) for pair in pairwise(ordered))
