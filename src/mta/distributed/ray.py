"""Executor on Ray: each actor holds one base and computes pieces; failures of machines are tolerated.

Results are states in a store, keyed by their work, so computing a piece twice is harmless. Another worker recomputes
the piece of a dead worker. A failing piece is retried in halves until the person whose data fails is found; all other
people finish.
Needs the extra ``ray``; the rest of mta works without Ray.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mta.distributed.executor import C, Outcome, P, R
from mta.distributed.scheduler import Scheduler
from mta.errors import ClusterError
from mta.system.atomic import SHARED
from mta.system.device import cores
from mta.system.extras import require
from mta.system.malloc import keep_freed_memory
from mta.system.provenance import versions

_DIAL = 10.0  # seconds to wait for a connection to the cluster's head
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Cluster:
    """Workers of a Ray cluster at an address (``ray://host:10001``); ``local`` starts a cluster on this machine.

    >>> with Cluster("local", workers=4) as cluster:
    ...     Personalizer(base, bank, store="s3://bucket/people", executor=cluster).personalize(people)

    At most ``most`` people are computed together, with ``threads`` threads: of these arguments, only these two affect
    results. A worker takes ``threads`` CPUs, and a GPU if the cluster has any and ``gpu`` is not False. A piece counts
    as failing after ``attempts`` workers have died of it.
    Raises MissingExtra without Ray, and ClusterError if the cluster cannot be reached.
    """

    in_process = False

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
        self._ray = _connected(address, workers)
        found = self._ray.cluster_resources()
        self.gpus = 0 if gpu is False or not found.get("GPU") else 1
        room = int(found["GPU"] if self.gpus else found.get("CPU", 0) // threads)
        self.workers = workers or room
        if not room:
            self.close()
            raise ClusterError(
                f"no room for a worker: it needs {threads} CPUs, the cluster has {found.get('CPU', 0):.0f}",
                hint="Ask for fewer threads, or add nodes.",
            )

    def run(
        self, function: Callable[[C, P], R], pieces: Iterable[P], here: C, elsewhere: Callable[[], C]
    ) -> Iterator[Outcome[P, R]]:
        """Yield the outcome of ``function(context, piece)`` for each piece, in order of completion.

        Closing the iterator stops the workers. Raises ClusterError, and the errors of ``elsewhere`` in a worker.
        """
        ray = self._ray
        made = ray.put((_version(), elsewhere))

        def hire() -> Any:
            resources = {"num_cpus": self.threads, "num_gpus": self.gpus}
            return (
                ray.remote(Worker).options(max_restarts=0, runtime_env={"env_vars": self._own()}, **resources).remote()
            )

        scheduler = Scheduler[P, R](ray, hire, made, function, self.workers, self.attempts)
        try:
            yield from scheduler.work_through(pieces)
        finally:
            scheduler.dismiss()

    def _own(self) -> dict[str, str]:
        """Return environment variables added to a worker's. They contain no secret, because Ray logs them."""
        hidden = {} if self.gpus else {"CUDA_VISIBLE_DEVICES": ""}
        same = {name: os.environ[name] for name in ("MTA_KERNELS", SHARED) if name in os.environ}
        return hidden | {name: str(self.threads) for name in _THREADS} | {"OMP_WAIT_POLICY": "passive"} | same

    def close(self) -> None:
        """Disconnect from the cluster, and stop it if it was started here."""
        self._ray.shutdown()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Worker:
    """Ray actor: creates its context once, and applies functions to pieces with it."""

    def __init__(self) -> None:
        self.context: Any = None

    def open(self, made: tuple[str, Callable[[], Any]]) -> None:
        """Create the context. Raises ClusterError if this node has another version of mta."""
        version, elsewhere = made
        if version != _version():
            raise ClusterError(
                f"a worker has mta {_version()}, expected {version}", hint="Install the same version on all machines."
            )
        keep_freed_memory()  # allowed: an actor is its own process
        self.context = elsewhere()

    def run(self, function: Callable[[Any, P], R], piece: P) -> R:
        """Return ``function(context, piece)``."""
        return function(self.context, piece)


def _version() -> str:
    return versions()["merge-then-adapt"]


def _connected(address: str, workers: int | None) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # printed errors might contain people's texts
    require("ray")
    import ray

    how: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    try:
        if address == "local":
            ray.init(num_cpus=max(workers or 0, cores()), include_dashboard=False, **how)
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
