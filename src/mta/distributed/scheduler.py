"""Who works on what, who died, what is tried again: the book-keeping of a cluster's workers."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic

from mta.distributed.executor import Outcome, P, R
from mta.errors import ClusterError, MtaError, StoreError

log = logging.getLogger("mta")
_LISTEN = 1.0  # seconds between two looks at stragglers and at workers that are still missing
_STRAGGLES = 2.0  # times as long as others took for as many people
_PATIENCE = 60.0  # seconds without any worker before that is said


@dataclass(slots=True, eq=False)
class _Try(Generic[P]):
    """A piece on its way: how many workers may still die of it, on how many it is, and what it is a part of."""

    piece: P
    left: int
    whole: _Whole
    running: int = 0
    done: bool = False


@dataclass(slots=True)
class _Whole:
    """What became of the parts of a piece that had to be parted."""

    size: int
    errors: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Shift(Generic[P]):
    """A worker at a piece, since when."""

    worker: Any
    trying: _Try[P]
    began: float


class Fleet(Generic[P, R]):
    """Keeps ``size`` workers busy: ``hire`` makes one, which opens what is ``made`` for it."""

    def __init__(
        self, ray: Any, hire: Callable[[], Any], made: Any, function: Callable[..., R], size: int, attempts: int
    ) -> None:
        self.ray, self.hire, self.made, self.size, self.attempts = ray, hire, made, size, attempts
        self.function = ray.put(function)
        self.todo: deque[_Try[P]] = deque()
        self.opening: dict[Any, Any] = {}  # ref -> worker
        self.idle: list[Any] = []
        self.busy: dict[Any, _Shift[P]] = {}
        self.paces: list[float] = []  # seconds for each person, piece by piece
        self.begun, self.stillborn = False, 0

    def work_through(self, pieces: Iterable[P]) -> Iterator[Outcome[P, R]]:
        """All pieces, as they are done; those parted come out as their parts."""
        self.todo.extend(_Try(piece, self.attempts, _Whole(len(piece))) for piece in pieces)
        heard = time.monotonic()
        while self.todo or any(not shift.trying.done for shift in self.busy.values()):
            self._keep_busy()
            refs = [*self.busy, *self.opening]
            ready, _ = self.ray.wait(refs, num_returns=1, timeout=_LISTEN) if refs else ([], [])
            for ref in ready:
                if ref in self.opening:
                    self._opened(ref)
                else:
                    yield from self._ended(self.busy.pop(ref), ref)
            if ready or self.busy:
                heard = time.monotonic()
            elif time.monotonic() - heard > _PATIENCE:
                heard = time.monotonic()
                log.warning("no worker has come up yet: the cluster has no room for one, or it still loads the base")

    def dismiss(self) -> None:
        """Let all workers go, whatever they are at."""
        everybody = [*self.opening.values(), *self.idle, *(shift.worker for shift in self.busy.values())]
        for worker in everybody:
            self._let_go(worker)
        self.idle.clear()

    def _let_go(self, worker: Any) -> None:
        with contextlib.suppress(Exception):  # it may be gone with its machine, or the whole cluster
            self.ray.kill(worker)

    def _keep_busy(self) -> None:
        unfinished = len(self.todo) + sum(not shift.trying.done for shift in self.busy.values())
        here = len(self.opening) + len(self.idle) + len(self.busy)
        for _ in range(min(self.size, unfinished) - here):
            worker = self.hire()
            self.opening[worker.open.remote(self.made)] = worker
        while self.idle and (trying := self.todo.popleft() if self.todo else self._straggler()):
            worker = self.idle.pop()
            trying.running += 1
            self.busy[worker.run.remote(self.function, trying.piece)] = _Shift(worker, trying, time.monotonic())

    def _straggler(self) -> _Try[P] | None:
        """What takes much longer than it should, for a second worker: whoever is first counts."""
        if not self.paces:
            return None
        usual, now = statistics.median(self.paces), time.monotonic()
        late = [
            (now - shift.began, shift.trying)
            for shift in self.busy.values()
            if shift.trying.running == 1 and not shift.trying.done
            if now - shift.began > _LISTEN + _STRAGGLES * usual * len(shift.trying.piece)
        ]
        return max(late, key=lambda found: found[0])[1] if late else None

    def _opened(self, ref: Any) -> None:
        worker = self.opening.pop(ref)
        try:
            self.ray.get(ref)
        except self.ray.exceptions.RayError as error:  # gone with its machine, or for want of memory; or told us why
            self._let_go(worker)
            self.stillborn += 1
            if isinstance(error, self.ray.exceptions.RayTaskError) and not self.begun:
                raise _cause(error) from None
            if self.stillborn > self.attempts * self.size:
                raise ClusterError(
                    f"{self.stillborn} workers in a row could not begin: {_said(error)}",
                    hint="See whether the base fits a worker's memory; what is done is kept.",
                ) from None
        else:
            self.idle.append(worker)
            self.begun, self.stillborn = True, 0

    def _ended(self, shift: _Shift[P], ref: Any) -> Iterator[Outcome[P, R]]:
        trying = shift.trying
        trying.running -= 1
        try:
            result = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            self.idle.append(shift.worker)
            cause = _cause(error)
            if type(cause) is StoreError:  # the store itself, not somebody's damaged or overtaken state
                raise cause from None
            if not trying.done and not trying.running:  # else another is at it
                yield from self._failed(trying, f"{type(cause).__name__}: {cause}")
        except self.ray.exceptions.RayError as error:  # the worker is gone, or what it found
            self._let_go(shift.worker)
            trying.left -= 1
            if trying.done or trying.running:
                return  # another has done it, or is at it
            if trying.left > 0:
                self.todo.appendleft(trying)
            else:
                yield from self._failed(trying, f"workers died of it, {_said(error)}")
        else:
            self.idle.append(shift.worker)
            self.paces.append((time.monotonic() - shift.began) / max(len(trying.piece), 1))
            if not trying.done:
                trying.done = True
                yield Outcome(trying.piece, result)

    def _failed(self, trying: _Try[P], error: str) -> Iterator[Outcome[P, R]]:
        trying.done = True
        if halves := trying.piece.halves():
            for half in halves:
                self.todo.append(_Try(half, self.attempts if len(half) == 1 else 1, trying.whole))
            return
        whole = trying.whole
        whole.errors.append(error)
        if not self.paces and len(whole.errors) == whole.size > 1 and len({*whole.errors}) == 1:
            raise ClusterError(
                f"nobody of a cohort of {whole.size} could be computed: {error}",
                hint="It is nobody's data, then. What is done is kept: mend it, and repeat the command.",
            )
        yield Outcome(trying.piece, None, error)


def _cause(error: Any) -> Exception:
    """What was raised in the worker, as it was if it is ours."""
    cause = error.cause if isinstance(error.cause, Exception) else error
    if isinstance(cause, MtaError):
        return cause
    return ClusterError(f"a worker failed: {_said(cause)}", hint="Its traceback stands in the worker's log:  ray logs")


def _said(error: BaseException) -> str:
    """What kind it is, and no more: its words may be somebody's."""
    return type(error).__name__
