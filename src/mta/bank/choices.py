"""What a calibration tries, and how it chooses from people's gains. Source: our choice; docs/decisions/021."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mta.bank.calibration import Gain

RATES = (8e-4, 1.6e-3, 3.2e-3, 6.4e-3)  # of a stack's single step
_SURE = 1.96  # standard errors by which a stack must help
_WORSE = 0.02  # nats per token; smaller losses do not count
T = TypeVar("T")


def best_of(gains: Tensor) -> int:
    """Return the candidate with the largest mean gain over the first one, less its standard error.

    Gains (U, candidates). The first one is returned where no other is clearly better.
    """
    return int(_surely(gains - gains[:, :1], 1).argmax())


def rate_from(gains: Tensor) -> int:
    """Return the best candidate among those that surely gain over the first one: no stack. Gains (U, candidates)."""
    more = gains - gains[:, :1]
    return int(_surely(more, 1).masked_fill(_surely(more, _SURE) < 0, -math.inf).argmax())


def _surely(gains: Tensor, errors: float) -> Tensor:
    """Return each candidate's mean gain, less that many of its standard errors."""
    return torch.nan_to_num(gains.mean(0) - errors * gains.std(0) / math.sqrt(len(gains)), nan=-math.inf)


def chosen_by_others(gains: Tensor, groups: Sequence[str], choose: Callable[[Tensor], T]) -> list[T]:
    """Return for each person what is chosen from the gains (U, candidates) of everybody in other groups."""
    others = {group: torch.tensor([other != group for other in groups]) for group in set(groups)}
    chosen = {group: choose(gains[mask]) for group, mask in others.items()}
    return [chosen[group] for group in groups]


def gain_of(shots: int, gains: Tensor) -> Gain:
    """Return the mean gain of people (U,) with its 95% interval (normal approximation)."""
    mean, half = float(gains.mean()), 1.96 * float(gains.std()) / math.sqrt(len(gains))
    worse = float((gains < -_WORSE).double().mean())
    return Gain(shots=shots, people=len(gains), mean=mean, low=mean - half, high=mean + half, worse=worse)
