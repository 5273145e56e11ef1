"""Progress reports of long computations, for progress bars and metrics files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """The progress of a stage after one step, for example of an optimizer.

    ``loss`` is the mean over people; None if the stage trains nothing.
    """

    step: int
    people: int
    examples: int
    examples_total: int
    loss: float | None = None


OnStep = Callable[[str, Step], None]
"""Called with the name of the stage and each of its steps."""
