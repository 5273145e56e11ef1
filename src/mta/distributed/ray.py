"""Executor on Ray: each actor holds one base and computes pieces; failures of machines are tolerated.

A piece gives the same result on every worker, so computing it twice is harmless. A scheduler gives pieces to workers.
Another worker recomputes the piece of a dead worker. A failing cohort is retried in halves until the person whose data
fails is found; all other people finish.
Needs the extra ``ray``; the rest of mta works without Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic

from mta.distributed.executor import C, P, PieceResult, R
from mta.errors import ClusterError, Diverged, MtaError, StoreError
from mta.system.atomic import SHARED
from mta.system.extras import require
from mta.system.process import cores, keep_freed_memory
from mta.system.provenance import sources_digest

log = logging.getLogger("mta")
_POLL = 1.0  # seconds between two checks whether workers are missing
_PATIENCE = 60.0  # seconds without any worker before a warning
_DIAL = 10.0  # seconds to wait for a connection to the cluster's head
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Cluster(contextlib.AbstractContextManager["Cluster"]):
    """Workers of a Ray cluster at an address (``ray://host:10001``); ``local`` starts a cluster on this machine.

    >>> with Cluster("local", workers=4) as cluster:
    ...     Personalizer(base, bank, store="s3://bucket/people", executor=cluster).personalize(people)

    At most ``most`` people are computed together, with ``threads`` threads: of these arguments, only these two affect
    results. A worker takes ``threads`` CPUs, and a GPU if the cluster has any and ``gpu`` is not False. A piece counts
    as failing after ``attempts`` workers have died of it.
    Raises MissingExtra without Ray, and ClusterError if the cluster cannot be reached.
    """

    threads: int | None
    in_process: bool = False
    on_gpu: bool | None

    def __init__(
        self,
        address: str = "local",
        *,
        workers: int | None = None,
        most: int = 32,
        threads: int = 1,
        gpu: bool | None = None,
        attempts: int = 3,
    ) -> None:
        self.most, self.threads, self.attempts = most, threads, attempts
        self.pool: WorkerPool | None = None
        self.ray = _connected(address, workers)
        resources = self.ray.cluster_resources()
        self.gpus = 0 if gpu is False or not resources.get("GPU") else 1  # of each worker
        self.on_gpu = bool(self.gpus)
        room = int(resources["GPU"] if self.gpus else resources.get("CPU", 0) // threads)
        self.workers = workers or room
        if not room:
            self.close()
            raise ClusterError(
                f"no room for a worker: it needs {threads} CPUs, the cluster has {resources.get('CPU', 0):.0f}",
                hint="Ask for fewer threads, or add nodes.",
            )

    def run(self, function: Callable[[C, P], R], pieces: Iterable[P], context: C) -> Iterator[PieceResult[P, R]]:
        """Yield the outcome of ``function(context, piece)`` for each piece, in order of completion.

        Workers that are idle at the end stay for the next call with an equal opener, until ``close``; closing the
        iterator stops busy ones. Raises ClusterError, and the errors of the opener in a worker.
        """
        known = [*pieces]  # making them may need the cluster, whose workers would then be another pool's
        scheduler = PieceScheduler[P, R](self, function, self._pool_of(context.opener))
        try:
            yield from scheduler.work_through(known)
        finally:
            scheduler.stop_busy()

    def _pool_of(self, opener: Callable[[], Any]) -> WorkerPool:
        """Return the workers of the last call if they have this context, else new ones."""
        if not self.pool or self.pool.opener != opener:
            self.dismiss()
            self.pool = WorkerPool(opener, self.ray.put((sources_digest(), opener)))
        return self.pool

    def dismiss(self) -> None:
        """Stop the idle workers."""
        for worker in self.pool.idle if self.pool else ():
            self.stop(worker)
        self.pool = None

    def stop(self, worker: Any) -> None:
        """Stop a worker."""
        with contextlib.suppress(Exception):  # the worker may have died with its machine or the whole cluster
            self.ray.kill(worker)

    def start_worker(self) -> Any:
        """Start a worker."""
        options = {"num_cpus": self.threads, "num_gpus": self.gpus, "runtime_env": {"env_vars": self._own()}}
        return self.ray.remote(Worker).options(max_restarts=0, **options).remote()

    def _own(self) -> dict[str, str]:
        """Return environment variables added to a worker's. They contain no secret, because Ray logs them."""
        hidden = {} if self.gpus else {"CUDA_VISIBLE_DEVICES": ""}
        same = {name: os.environ[name] for name in ("MTA_KERNELS", SHARED) if name in os.environ}
        return hidden | {name: str(self.threads) for name in _THREADS} | {"OMP_WAIT_POLICY": "passive"} | same

    def close(self) -> None:
        """Stop the workers and disconnect from the cluster; stop it, too, if it was started here."""
        self.dismiss()
        self.ray.shutdown()

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(slots=True)
class WorkerPool:
    """Workers with the context that ``opener`` opens; ``sent`` is a reference to it. ``idle`` ones have no piece.

    ``any_opened``: the context could be opened once, so that a failure is a machine's.
    """

    opener: Callable[[], Any]
    sent: Any
    idle: list[Any] = field(default_factory=list)
    any_opened: bool = False


@dataclass(frozen=True, slots=True)
class _Task(Generic[P]):
    """A piece to compute; it fails after ``attempts`` more workers have died of it.

    ``size`` and ``errors`` belong to the piece that was split to get this one; all its parts share them.
    """

    piece: P
    attempts: int
    size: int
    errors: list[str]


class PieceScheduler(Generic[P, R]):
    """Gives pieces to the workers of a cluster, replaces dead workers, and retries failed pieces."""

    def __init__(self, cluster: Cluster, function: Callable[[C, P], R], pool: WorkerPool) -> None:
        self.cluster, self.ray, self.attempts = cluster, cluster.ray, cluster.attempts
        self.function, self.pool, self.idle = self.ray.put(function), pool, pool.idle
        self.waiting: deque[_Task[P]] = deque()
        self.opening: dict[Any, Any] = {}  # ref -> worker
        self.busy: dict[Any, tuple[Any, _Task[P]]] = {}  # ref -> worker and its task
        self.any_result = False
        self.failed_starts = 0  # workers in a row that could not open their context
        self.most = cluster.workers  # that can have a piece

    def work_through(self, pieces: Sequence[P]) -> Iterator[PieceResult[P, R]]:
        """Yield the outcomes in order of completion; a piece that was split yields the outcomes of its parts."""
        self.waiting.extend(_Task(piece, self.attempts, len(piece), []) for piece in pieces)
        self.most = min(self.most, len(pieces))
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

    def stop_busy(self) -> None:
        """Stop the workers that are not idle."""
        for worker in [*self.opening.values(), *(worker for worker, _ in self.busy.values())]:
            self.cluster.stop(worker)

    def _assign(self) -> None:
        """Start missing workers, and give waiting tasks to idle workers."""
        wanted = min(self.cluster.workers, len(self.waiting) + len(self.busy))
        if self._has_lost_hope() and (self.busy or self.idle):  # for example, one of the machines is unusable
            wanted = 0
        for _ in range(wanted - len(self.opening) - len(self.idle) - len(self.busy)):
            worker = self.cluster.start_worker()
            self.opening[worker.open.remote(self.pool.sent)] = worker
        while self.idle and self.waiting:
            worker, task = self.idle.pop(), self.waiting.popleft()
            self.busy[worker.run.remote(self.function, task.piece)] = worker, task

    def _has_lost_hope(self) -> bool:
        """Return whether so many workers in a row could not start that others would not either."""
        return self.failed_starts > self.attempts * self.most

    def _opened(self, ref: Any) -> None:
        worker = self.opening.pop(ref)
        try:
            self.ray.get(ref)
        except self.ray.exceptions.RayError as error:  # the worker died, or its context cannot be created
            self.cluster.stop(worker)
            self.failed_starts += 1
            log.warning("a worker could not start: %s", _kind(error))
            if isinstance(error, self.ray.exceptions.RayTaskError) and not self.pool.any_opened:
                raise _cause(error) from None
            if self._has_lost_hope() and not (self.busy or self.idle):
                raise ClusterError(
                    f"{self.failed_starts} workers in a row could not start: {_kind(error)}",
                    hint="Check that the base fits into a worker's memory, then repeat the command: results are kept.",
                ) from None
        else:
            self.idle.append(worker)
            self.pool.any_opened, self.failed_starts = True, 0

    def _ended(self, ref: Any) -> Iterator[PieceResult[P, R]]:
        worker, task = self.busy.pop(ref)
        try:
            result = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            self.idle.append(worker)
            cause = _cause(error)
            # The store itself (a subclass is about one person's state), or diverged training, as without a cluster.
            if type(cause) in (StoreError, Diverged):
                raise cause from None
            yield from self._failed(task, f"{type(cause).__name__}: {cause}")
        except self.ray.exceptions.RayError as error:  # the worker died, or its result was lost
            self.cluster.stop(worker)
            while self.idle:  # they may have died with the same machine
                self.cluster.stop(self.idle.pop())
            if task.attempts > 1:
                self.waiting.appendleft(replace(task, attempts=task.attempts - 1))
            else:
                yield from self._failed(task, f"workers died of it, {_kind(error)}")
        else:
            self.idle.append(worker)
            self.any_result = True
            yield PieceResult(task.piece, result)

    def _failed(self, task: _Task[P], error: str) -> Iterator[PieceResult[P, R]]:
        """Split a failed piece, or yield its error if it cannot be split."""
        if halves := task.piece.halves():
            for half in halves:
                self.waiting.append(replace(task, piece=half, attempts=self.attempts if len(half) == 1 else 1))
            return
        errors = task.errors
        errors.append(error)
        if not self.any_result and len(errors) == task.size > 1 and len({*errors}) == 1:
            raise ClusterError(
                f"no person of a cohort of {task.size} could be computed: {error}",
                hint="The same error for every person is not caused by their data. Fix it, then repeat the command.",
            )
        yield PieceResult(task.piece, None, error)


class Worker:
    """Ray actor: creates its context once, and applies functions to pieces with it."""

    def __init__(self) -> None:
        self.context: Any = None

    def open(self, sent: tuple[str, Callable[[], Any]]) -> None:
        """Open the context. Raises ClusterError if this node has other sources of mta."""
        expected, opener = sent
        if (digest := sources_digest()) != expected:
            raise ClusterError(
                f"a worker has other sources of mta (sha256 {digest[:12]}…), expected {expected[:12]}…",
                hint="Install the same version on all machines.",
            )
        keep_freed_memory()  # allowed: an actor is its own process
        self.context = opener()

    def run(self, function: Callable[[Any, P], R], piece: P) -> R:
        """Return ``function(context, piece)``."""
        return function(self.context, piece)


def _connected(address: str, workers: int | None) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # printed errors might contain people's texts
    require("ray")
    import ray

    how: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    try:
        if address == "local":
            # The address keeps Ray from joining a cluster that runs here, or that RAY_ADDRESS names.
            ray.init(address="local", num_cpus=max(workers or 0, cores()), include_dashboard=False, **how)
        else:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=_DIAL).close()  # fail fast: Ray would retry for minutes
            ray.init(address=address, **how)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ClusterError(
            f"no Ray cluster at {address!r}: {reason}",
            hint="Give local, host:6379 or ray://host:10001, and check that  ray status  works there.",
        ) from error
    return ray


def _cause(error: Any) -> Exception:
    """Return the exception raised in the worker if it is an MtaError, else a ClusterError with its type."""
    cause = error.cause if isinstance(error.cause, Exception) else error
    if isinstance(cause, MtaError):
        return cause
    return ClusterError(f"a worker failed: {_kind(cause)}", hint="Its traceback is in the worker's log:  ray logs")


def _kind(error: BaseException) -> str:
    """Return the error's type only: its message may contain a person's text."""
    return type(error).__name__
