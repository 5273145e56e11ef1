"""Choices from people's gains, made by the others for each person. Source: our choice, docs/decisions/021."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mta.bank.calibration.info import Gain, Rival
from mta.config.constants import NOTICEABLE, SHOTS
from mta.system.units import student_t

T = TypeVar("T")
_TYPICAL = 8  # shots, for which merge and rate are chosen


def measured_shots(shots: Tensor, enough: int, fewer: bool) -> list[int]:
    """Return the numbers of shots to measure: those that ``enough`` people have, or without ``fewer`` the largest one.

    ``shots`` (U,) is everybody's number.
    """
    if fewer:
        return [n for n in SHOTS if int((shots >= n).sum()) >= enough]
    return [int(shots.sort(descending=True).values[enough - 1])]


def typical_shots(shots: Collection[int]) -> int:
    """Return the number of shots for which merge and rate are chosen."""
    return _TYPICAL if _TYPICAL in shots else max(shots)


def best_of(gains: Tensor, sure: float = 1.0) -> int:
    """Return the candidate with the largest mean gain over candidate 0, less its standard error.

    Gains (U, candidates). 0 is returned where no other gain exceeds ``sure`` standard errors.
    """
    if not len(gains):
        return 0
    more = gains - gains[:, :1]
    mean, error = more.mean(0), standard_error(more)
    clear = mean >= sure * error  # False where it is not a number
    return int((mean - error).masked_fill(~clear, -math.inf).argmax())


def surely_best(gains: Tensor) -> int:
    """Return the best candidate; 0 where no other one gains beyond its 95% interval."""
    return best_of(gains, sure=student_t(len(gains)))


def best_on_average(gains: Tensor) -> int:
    """Return the candidate with the largest mean gain (U, candidates); the first of equals."""
    means = gains.mean(0).nan_to_num(-math.inf, posinf=-math.inf)
    return int(means.argmax()) if len(gains) else 0


def standard_error(gains: Tensor) -> Tensor:
    """Return the standard error of people's mean gain, (U, …) -> (…)."""
    return gains.std(0) / len(gains) ** 0.5 if len(gains) > 1 else torch.full_like(gains[0], math.inf)


def chosen_by_others(gains: Tensor, counted: Tensor, choose: Callable[[Tensor], T]) -> tuple[list[T], T]:
    """Return for each person what is chosen without them, and what is chosen by everybody.

    Shapes: gains (U, candidates), counted (U,): people with gains that are looked at.
    """
    people = torch.arange(len(gains))
    return [choose(gains[counted & (people != u)]) for u in range(len(gains))], choose(gains[counted])


def gain_of(shots: int, gains: Tensor) -> Gain:
    """Return the mean gain of people (U,) with its 95% interval."""
    mean, half = float(gains.mean()), student_t(len(gains)) * float(standard_error(gains))
    worse = float((gains < -NOTICEABLE).double().mean())
    return Gain(shots=shots, people=len(gains), mean=mean, low=mean - half, high=mean + half, worse=worse)


def rival_of(
    name: str,
    settings: Sequence[float],
    gains: Tensor,
    ours: Tensor,
    counted: Tensor,
    shots: int,
    tried: Tensor | None = None,
) -> Rival:
    """Return what people gain by a rival with its best setting on average, and how much more they gain by ours.

    Gains (U, settings) and ours (U,) are with ``shots`` shots, of the ``counted`` people (U,). A person's gain is with
    the setting that the others chose; if everybody together chooses setting 0, the rival is the pooled model.
    ``tried`` are the gains to choose by, if others.
    """
    chosen, final = chosen_by_others(gains if tried is None else tried, counted, best_on_average)
    if not settings[final]:
        chosen = [final] * len(chosen)
    gain = gains[torch.arange(len(gains)), torch.tensor(chosen)]
    known = gain_of(shots, gain[counted]), gain_of(shots, (ours - gain)[counted])
    return Rival(name=name, setting=settings[final], gain=known[0], ahead=known[1])
