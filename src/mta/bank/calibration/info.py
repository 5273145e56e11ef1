"""The readable part of a calibration, as it is in ``bank.json``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Gain(BaseModel):
    """What a person is expected to gain on later items from ``shots`` items, measured on ``people`` people.

    ``mean`` with its 95% interval (``low``, ``high``): decrease of the mean NLL per target token against the pooled
    model, in nats. ``worse``: share of people whose NLL rose by more than 0.02.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    shots: int
    people: int
    mean: float
    low: float
    high: float
    worse: float


class CalibrationInfo(BaseModel):
    """The readable part of a calibration: how far gradients are trusted, and what to expect from it.

    ``prior`` is the strength of the prior in shots, and ``ridge`` the part of the mean curvature that is added to all
    directions. ``rate`` is the learning rate of a stack's single step (0: a stack does not help; None: not measured).
    ``gains`` are the expected gains of a merge for several numbers of shots, ``stacked`` those of merge and stack,
    ``people`` is the number of people behind them, and ``notes`` say what could not be measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    ridge: float
    prior: float
    rate: float | None = None
    people: int = 0
    gains: tuple[Gain, ...] = ()
    stacked: tuple[Gain, ...] = ()
    notes: tuple[str, ...] = ()


DEFAULTS = CalibrationInfo(ridge=1.0, prior=16.0)  # where there are too few people to choose
