"""Scheduler of a cluster: assigns pieces to workers, replaces dead workers, and retries failed pieces."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic

from mta.distributed.executor import Outcome, P, R
from mta.errors import ClusterError, MtaError, StoreError

log = logging.getLogger("mta")
_POLL = 1.0  # seconds between two checks whether workers are missing
_PATIENCE = 60.0  # seconds without any worker before a warning


@dataclass(frozen=True, slots=True)
class _Task(Generic[P]):
    """A piece to compute; it fails after ``attempts`` more workers have died of it.

    ``size`` and ``errors`` belong to the piece that was split to get this one; all its parts share them.
    """

    piece: P
    attempts: int
    size: int
    errors: list[str]


class Scheduler(Generic[P, R]):
    """Computes pieces on ``size`` workers. ``hire`` creates a worker, which opens ``made`` to get its context."""

    def __init__(
        self, ray: Any, hire: Callable[[], Any], made: Any, function: Callable[..., R], size: int, attempts: int
    ) -> None:
        self.ray, self.hire, self.made, self.size, self.attempts = ray, hire, made, size, attempts
        self.function = ray.put(function)
        self.waiting: deque[_Task[P]] = deque()
        self.opening: dict[Any, Any] = {}  # ref -> worker
        self.idle: list[Any] = []
        self.busy: dict[Any, tuple[Any, _Task[P]]] = {}  # ref -> worker and its task
        self.any_opened, self.any_result = False, False
        self.failed_starts = 0  # workers in a row that could not open their context

    def work_through(self, pieces: Iterable[P]) -> Iterator[Outcome[P, R]]:
        """Yield the outcomes in order of completion; a piece that was split yields the outcomes of its parts."""
        self.waiting.extend(_Task(piece, self.attempts, len(piece), []) for piece in pieces)
        last = time.monotonic()
        while self.waiting or self.busy:
            self._assign()
            refs = [*self.busy, *self.opening]
            ready, _ = self.ray.wait(refs, num_returns=1, timeout=_POLL) if refs else ([], [])
            for ref in ready:
                if ref in self.opening:
                    self._opened(ref)
                else:
                    yield from self._ended(ref)
            if ready or self.busy:
                last = time.monotonic()
            elif time.monotonic() - last > _PATIENCE:
                last = time.monotonic()
                log.warning("no worker has started yet: the cluster has no room, or a worker still loads the base")

    def dismiss(self) -> None:
        """Stop all workers, also busy ones."""
        for worker in [*self.opening.values(), *self.idle, *(worker for worker, _ in self.busy.values())]:
            self._stop(worker)
        self.idle.clear()

    def _stop(self, worker: Any) -> None:
        with contextlib.suppress(Exception):  # the worker may have died with its machine or the whole cluster
            self.ray.kill(worker)

    def _assign(self) -> None:
        """Start missing workers, and give waiting tasks to idle workers."""
        wanted = min(self.size, len(self.waiting) + len(self.busy))
        for _ in range(wanted - len(self.opening) - len(self.idle) - len(self.busy)):
            worker = self.hire()
            self.opening[worker.open.remote(self.made)] = worker
        while self.idle and self.waiting:
            worker, task = self.idle.pop(), self.waiting.popleft()
            self.busy[worker.run.remote(self.function, task.piece)] = worker, task

    def _opened(self, ref: Any) -> None:
        worker = self.opening.pop(ref)
        try:
            self.ray.get(ref)
        except self.ray.exceptions.RayError as error:  # the worker died, or its context cannot be created
            self._stop(worker)
            self.failed_starts += 1
            if isinstance(error, self.ray.exceptions.RayTaskError) and not self.any_opened:
                raise _cause(error) from None
            if self.failed_starts > self.attempts * self.size:
                raise ClusterError(
                    f"{self.failed_starts} workers in a row could not start: {_kind(error)}",
                    hint="Check that the base fits into a worker's memory, then repeat the command: results are kept.",
                ) from None
        else:
            self.idle.append(worker)
            self.any_opened, self.failed_starts = True, 0

    def _ended(self, ref: Any) -> Iterator[Outcome[P, R]]:
        worker, task = self.busy.pop(ref)
        try:
            result = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            self.idle.append(worker)
            cause = _cause(error)
            if type(cause) is StoreError:  # the store itself; a subclass is about one person's state
                raise cause from None
            yield from self._failed(task, f"{type(cause).__name__}: {cause}")
        except self.ray.exceptions.RayError as error:  # the worker died, or its result was lost
            self._stop(worker)
            if task.attempts > 1:
                self.waiting.appendleft(_Task(task.piece, task.attempts - 1, task.size, task.errors))
            else:
                yield from self._failed(task, f"workers died of it, {_kind(error)}")
        else:
            self.idle.append(worker)
            self.any_result = True
            yield Outcome(task.piece, result)

    def _failed(self, task: _Task[P], error: str) -> Iterator[Outcome[P, R]]:
        """Split a failed piece, or yield its error if it cannot be split."""
        if halves := task.piece.halves():
            for half in halves:
                self.waiting.append(_Task(half, self.attempts if len(half) == 1 else 1, task.size, task.errors))
            return
        errors = task.errors
        errors.append(error)
        if not self.any_result and len(errors) == task.size > 1 and len({*errors}) == 1:
            raise ClusterError(
                f"no person of a cohort of {task.size} could be computed: {error}",
                hint="The same error for every person is not caused by their data. Fix it, then repeat the command.",
            )
        yield Outcome(task.piece, None, error)


def _cause(error: Any) -> Exception:
    """Return the exception raised in the worker if it is an MtaError, else a ClusterError with its type."""
    cause = error.cause if isinstance(error.cause, Exception) else error
    if isinstance(cause, MtaError):
        return cause
    return ClusterError(f"a worker failed: {_kind(cause)}", hint="Its traceback is in the worker's log:  ray logs")


def _kind(error: BaseException) -> str:
    """Return the error's type only: its message may contain a person's text."""
    return type(error).__name__
