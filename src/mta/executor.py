"""How cohorts are worked through: the same functions in this process, or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

W = TypeVar("W")
R = TypeVar("R")


class Executor(Protocol):
    """Applies one function to many pieces of work; results come in the order of the work."""

    def map(self, function: Callable[[W], R], work: Iterable[W]) -> Iterator[R]:
        """``function`` on each piece of ``work``."""


class LocalExecutor:
    """One piece after the other in this process; torch uses all cores for each."""

    def map(self, function: Callable[[W], R], work: Iterable[W]) -> Iterator[R]:
        """``function`` on each piece of ``work``."""
        return map(function, work)
