"""What a calibration tries, and how it chooses from people's gains. Source: our choice; docs/decisions/021."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from mta.bank.calibration.info import Gain
from mta.config.constants import NOTICEABLE
from mta.system.quantiles import student_t

RATES = (8e-4, 1.6e-3, 3.2e-3, 6.4e-3)  # of a stack's single step
T = TypeVar("T")


def best_of(gains: Tensor, groups: Tensor, sure: float = 1.0) -> int:
    """Return the candidate with the largest mean gain over candidate 0, less its standard error.

    Gains (U, candidates); groups (U,) of people who share items. 0 is returned where no other gain exceeds ``sure``
    standard errors.
    """
    if not len(gains):
        return 0
    more = gains - gains[:, :1]
    mean, error = more.mean(0), standard_error(more, groups)
    clear = mean >= sure * error  # False where it is not a number
    return int((mean - error).masked_fill(~clear, -math.inf).argmax())


def surely_best(gains: Tensor, groups: Tensor) -> int:
    """Return the best candidate; 0 where no other one gains beyond its 95% interval."""
    return best_of(gains, groups, sure=student_t(len(set(groups.tolist()))))


def best_on_average(gains: Tensor, groups: Tensor) -> int:
    """Return the candidate with the largest mean gain (U, candidates); the first of equals. It reads no groups."""
    means = gains.mean(0).nan_to_num(-math.inf, posinf=-math.inf)
    return int(means.argmax()) if len(gains) else 0


def standard_error(gains: Tensor, groups: Tensor) -> Tensor:
    """Return the standard error of people's mean gain, (U, …) -> (…), where people of one group are not independent."""
    number = torch.unique(groups, return_inverse=True)[1]
    count = int(number.max()) + 1
    sums = gains.new_zeros(count, *gains.shape[1:]).index_add_(0, number, gains - gains.mean(0))
    return sums.square().sum(0).mul(count / (count - 1)).sqrt() / len(gains) if count > 1 else sums[0] + math.inf


def chosen_by_others(
    gains: Tensor, groups: Tensor, counted: Tensor, choose: Callable[[Tensor, Tensor], T]
) -> tuple[list[T], T]:
    """Return for each person what is chosen without their group, and what is chosen by everybody.

    Shapes: gains (U, candidates), groups (U,) of people who share items, counted (U,): whose gains are looked at.
    """

    def chosen(people: Tensor) -> T:
        return choose(gains[people], groups[people])

    others = {group: chosen(counted & (groups != group)) for group in set(groups.tolist())}
    return [others[group] for group in groups.tolist()], chosen(counted)


def gain_of(shots: int, gains: Tensor, groups: Tensor) -> Gain:
    """Return the mean gain of people (U,) in groups (U,) with its 95% interval."""
    mean, half = float(gains.mean()), student_t(len(set(groups.tolist()))) * float(standard_error(gains, groups))
    worse = float((gains < -NOTICEABLE).double().mean())
    return Gain(shots=shots, people=len(gains), mean=mean, low=mean - half, high=mean + half, worse=worse)
