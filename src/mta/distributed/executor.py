"""Executors that run pieces of work: sequentially in this process, or on workers (``mta.distributed.ray``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

R = TypeVar("R")
_MOST = 256  # people per cohort at most, so that results are saved regularly


class Piece(Protocol):
    """A piece of work. A failing cohort is retried in its ``halves``, until the failing person is found."""

    def __len__(self) -> int:
        """Return the number of people or anchors in the piece."""

    def halves(self) -> Sequence[Self]:
        """Return the same work as two pieces, or nothing (the default) if the piece cannot be split."""
        return ()


class Context(Protocol):
    """What a function reads in addition to its piece: models, settings, a store."""

    @property
    def opener(self) -> Callable[[], Self]:
        """A function that opens the same context in a worker. It can be pickled, and equal openers share workers."""


C = TypeVar("C", bound=Context)
P = TypeVar("P", bound=Piece)


@dataclass(frozen=True, slots=True)
class PieceResult(Generic[P, R]):
    """Result of a piece, or the ``error`` that remained after all attempts."""

    piece: P
    result: R | None
    error: str = ""


class Executor(Protocol):
    """Apply one function to many pieces of work.

    At most ``most`` people are computed together, with ``threads`` threads (None: the setting of the process). Only
    these two values affect the rounding of results; the number of workers does not. ``in_process``: functions run in
    this process. ``on_gpu``, for memory plans: whether workers use GPUs (None: the device of this process).
    """

    most: int
    threads: int | None
    in_process: bool
    on_gpu: bool | None

    def run(self, function: Callable[[C, P], R], pieces: Iterable[P], context: C) -> Iterator[PieceResult[P, R]]:
        """Yield the outcome of ``function(context, piece)`` for each piece, in any order.

        A worker opens its own context once, by ``context.opener``, and may keep it for the next call with an equal
        opener. Function and pieces must be picklable.
        """


class LocalExecutor:
    """Run pieces sequentially in this process; torch uses all cores for each piece. Errors are raised at once."""

    threads: int | None = None
    in_process: bool = True
    on_gpu: bool | None = None

    def __init__(self, most: int = _MOST) -> None:
        self.most = most

    def run(self, function: Callable[[C, P], R], pieces: Iterable[P], context: C) -> Iterator[PieceResult[P, R]]:
        """Yield the outcome of ``function(context, piece)`` for each piece, in order; pieces are consumed lazily."""
        for piece in pieces:
            yield PieceResult(piece, function(context, piece))
