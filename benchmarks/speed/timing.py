"""Two things measured in turn, and what their ratio is: A B A B, median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: how much faster ``ours`` is than ``peer``, both as rates (more is better) in ``unit``.

    ``rates`` and ``peer_rates`` are turn by turn; ``difference`` is the largest one found when results were compared
    before timing, with ``compared`` saying of what. ``skipped`` says why there is nothing else.
    """

    name: str
    ours: str
    peer: str
    unit: str = ""
    rates: tuple[float, ...] = ()
    peer_rates: tuple[float, ...] = ()
    target: float | None = None
    difference: float | None = None
    compared: str = ""
    note: str = ""
    skipped: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Turn by turn."""
        return tuple(ours / peer for ours, peer in zip(self.rates, self.peer_rates, strict=True))

    @property
    def ratio(self) -> float:
        """Median over the turns."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """Least and largest over the turns."""
        return min(self.ratios), max(self.ratios)

    @property
    def verdict(self) -> str:
        """ "met" or "missed" where there is a target."""
        if self.skipped:
            return f"skipped: {self.skipped}"
        if self.target is None or not self.rates:
            return ""
        return "met" if self.ratio >= self.target else "missed"


def turns(
    ours: Callable[[], float], peer: Callable[[], float], repeats: int, *, warm: bool = True
) -> tuple[list[float], list[float]]:
    """Rates of both, in turn: A B A B. Each is called once more before, untimed, to ``warm`` up.

    A callable returns how much work it did (people, tokens, bytes); its rate is that per second.
    """
    if warm:
        ours(), peer()
    mine, theirs = [], []
    for _ in range(repeats):
        mine.append(rate(ours))
        theirs.append(rate(peer))
    return mine, theirs


def rate(work: Callable[[], float]) -> float:
    """Work done per second. Kernels that a GPU has still to run count as work."""
    settle()
    start = time.perf_counter()
    done = work()
    settle()
    return done / (time.perf_counter() - start)


def settle() -> None:
    """Wait for the kernels that a GPU has still to run."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
