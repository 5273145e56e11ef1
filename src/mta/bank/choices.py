"""What a calibration tries, and how it chooses from people's gains. Source: our choice; docs/decisions/021."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from mta.bank.calibration import Gain

RATES = (8e-4, 1.6e-3, 3.2e-3, 6.4e-3)  # of a stack's single step
_SURE = 1.96  # standard errors by which a stack must help
_WORSE = 0.02  # nats per token; smaller losses do not count
T = TypeVar("T")


def best_of(gains: Tensor, groups: Tensor) -> int:
    """Return the candidate with the largest mean gain over candidate 0, less its standard error.

    Gains (U, candidates); groups (U,) of people who share items. 0 is returned where no other is clearly better.
    """
    return int(_lower_bound(gains - gains[:, :1], groups, 1).argmax())


def rate_from(gains: Tensor, groups: Tensor) -> int:
    """Return the best candidate with a gain over candidate 0, no stack, beyond its 95% interval; else 0.

    Gains (U, candidates); groups (U,).
    """
    more = gains - gains[:, :1]
    sure = _lower_bound(more, groups, _SURE) >= 0
    return int(_lower_bound(more, groups, 1).masked_fill(~sure, -math.inf).argmax())


def _lower_bound(gains: Tensor, groups: Tensor, errors: float) -> Tensor:
    """Return each candidate's mean gain, less that many of its standard errors; -inf if it is not a number."""
    return torch.nan_to_num(gains.mean(0) - errors * standard_error(gains, groups), nan=-math.inf)


def standard_error(gains: Tensor, groups: Tensor) -> Tensor:
    """Return the standard error of people's mean gain, (U, …) -> (…), where people of one group are not independent."""
    number = torch.unique(groups, return_inverse=True)[1]
    count = int(number.max()) + 1
    sums = gains.new_zeros(count, *gains.shape[1:]).index_add_(0, number, gains - gains.mean(0))
    return sums.square().sum(0).mul(count / (count - 1)).sqrt() / len(gains) if count > 1 else sums[0] + math.inf


def chosen_by_others(gains: Tensor, groups: Tensor, choose: Callable[[Tensor, Tensor], T]) -> list[T]:
    """Return for each person what is chosen from the gains (U, candidates) of everybody in other groups (U,)."""
    chosen = {group: choose(gains[groups != group], groups[groups != group]) for group in set(groups.tolist())}
    return [chosen[group] for group in groups.tolist()]


def gain_of(shots: int, gains: Tensor, groups: Tensor) -> Gain:
    """Return the mean gain of people (U,) in groups (U,) with its 95% interval (normal approximation)."""
    mean, half = float(gains.mean()), 1.96 * float(standard_error(gains, groups))
    worse = float((gains < -_WORSE).double().mean())
    return Gain(shots=shots, people=len(gains), mean=mean, low=mean - half, high=mean + half, worse=worse)
