"""Where pieces of work run: one after the other in this process, or on workers (``mta.distributed.ray``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

C = TypeVar("C")
R = TypeVar("R")
_MOST = 256  # so that something is finished now and then, however little a person needs


class Piece(Protocol):
    """Some of the work. What cannot be done can be tried in ``halves``, until it is known what it is that fails."""

    def __len__(self) -> int:
        """How many people, or anchors, are in it."""

    def halves(self) -> Sequence[Self]:
        """The same work in two pieces; empty where it cannot be parted."""


P = TypeVar("P", bound=Piece)


@dataclass(frozen=True, slots=True)
class Outcome(Generic[P, R]):
    """What became of a piece: its result, or what went wrong with it (``error``), however it was tried."""

    piece: P
    result: R | None
    error: str = ""


class Executor(Protocol):
    """Applies one function to many pieces of work.

    ``most`` people at most are computed together, with ``threads`` threads (None: as the process has it): both decide
    how a result is rounded, so the number of workers never does. ``in_process`` says whether functions run right here.
    """

    @property
    def most(self) -> int: ...

    @property
    def threads(self) -> int | None: ...

    @property
    def in_process(self) -> bool: ...

    def run(
        self, function: Callable[[C, P], R], pieces: Iterable[P], here: C, elsewhere: Callable[[], C]
    ) -> Iterator[Outcome[P, R]]:
        """``function(context, piece)`` for each piece, in any order.

        The context is ``here`` in this process; a worker makes its own with ``elsewhere``, once. Function, pieces and
        ``elsewhere`` can be pickled.
        """


class LocalExecutor:
    """One piece after the other in this process; torch uses all cores for each. Errors are raised as they come."""

    threads = None
    in_process = True

    def __init__(self, most: int = _MOST) -> None:
        self.most = most

    def run(
        self, function: Callable[[C, P], R], pieces: Iterable[P], here: C, elsewhere: Callable[[], C]
    ) -> Iterator[Outcome[P, R]]:
        """``function(here, piece)`` for each piece, in their order, and as they come."""
        for piece in pieces:
            yield Outcome(piece, function(here, piece))
