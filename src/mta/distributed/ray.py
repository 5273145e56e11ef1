"""An Executor on Ray: actors that hold one base each work through the pieces, whatever happens to their machines.

Results are states in a store, keyed by their work, so to do a piece twice is harmless: what a dead worker had is done
again by another, and at the end idle workers do what stragglers still have. A piece that fails is tried in halves until
it is known whose data it is; the others finish.
Needs the extra ``ray``; all else in mta works without.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mta.distributed.executor import C, Outcome, P, R
from mta.distributed.scheduler import Fleet
from mta.errors import ClusterError
from mta.system.atomic import SHARED
from mta.system.device import cores
from mta.system.malloc import keep_freed_memory
from mta.system.provenance import versions

_DIAL = 10.0  # seconds to wait for the head of a cluster
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Cluster:
    """Workers of a Ray cluster: ``local`` starts one on this machine, else its address (``ray://host:10001``).

    >>> with Cluster("local", workers=4) as cluster:
    ...     Personalizer(base, bank, store="s3://bucket/people", executor=cluster).personalize(people)

    ``most`` people are computed together at most, with ``threads`` threads: the result depends on both, and on nothing
    else here. A worker takes ``threads`` CPUs, and a GPU where the cluster has any and ``gpu`` is not False. A piece is
    given to ``attempts`` workers that die of it before it is held against it.
    Raises ClusterError where Ray is not installed or the cluster cannot be reached.
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
                f"no worker of {threads} threads has room: the cluster has {found.get('CPU', 0):.0f} CPUs",
                hint="Ask for fewer threads, or add nodes.",
            )

    def run(
        self, function: Callable[[C, P], R], pieces: Iterable[P], here: C, elsewhere: Callable[[], C]
    ) -> Iterator[Outcome[P, R]]:
        """``function(context, piece)`` by some worker for each piece, in the order they are done.

        Whoever stops listening stops the workers. Raises ClusterError, and what ``elsewhere`` raises in a worker.
        """
        ray = self._ray
        made = ray.put((_version(), elsewhere))

        def hire() -> Any:
            resources = {"num_cpus": self.threads, "num_gpus": self.gpus}
            return (
                ray.remote(Worker).options(max_restarts=0, runtime_env={"env_vars": self._own()}, **resources).remote()
            )

        fleet = Fleet[P, R](ray, hire, made, function, self.workers, self.attempts)
        try:
            yield from fleet.work_through(pieces)
        finally:
            fleet.dismiss()

    def _own(self) -> dict[str, str]:
        """A worker's environment, besides that of its node: no secret is sent, for Ray writes this to its logs."""
        hidden = {} if self.gpus else {"CUDA_VISIBLE_DEVICES": ""}
        same = {name: os.environ[name] for name in ("MTA_KERNELS", SHARED) if name in os.environ}
        return hidden | {name: str(self.threads) for name in _THREADS} | {"OMP_WAIT_POLICY": "passive"} | same

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self._ray.shutdown()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Worker:
    """What runs in an actor: it makes its context once, and applies functions to it."""

    def __init__(self) -> None:
        self.context: Any = None

    def open(self, made: tuple[str, Callable[[], Any]]) -> None:
        """Make the context. Raises ClusterError if another mta is installed here."""
        version, elsewhere = made
        if version != _version():
            raise ClusterError(
                f"a worker has mta {_version()}, expected {version}", hint="Install one version on all machines."
            )
        keep_freed_memory()  # an actor is a process of its own
        self.context = elsewhere()

    def run(self, function: Callable[[Any, P], R], piece: P) -> R:
        """Apply ``function``."""
        return function(self.context, piece)


def _version() -> str:
    return versions()["merge-then-adapt"]


def _connected(address: str, workers: int | None) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about this run leaves the machine
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # they would be printed, with whatever they say
    try:
        import ray
    except ImportError:
        raise ClusterError("Ray is not installed", hint="pip install 'merge-then-adapt[ray]'") from None
    how: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    try:
        if address == "local":
            ray.init(num_cpus=max(workers or 0, cores()), include_dashboard=False, **how)
        else:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=_DIAL).close()  # Ray would try for minutes
            ray.init(address=address, **how)
    except (OSError, RuntimeError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ClusterError(
            f"no Ray cluster at {address!r}: {said}",
            hint="Give local, host:6379 or ray://host:10001, and see that  ray status  works there.",
        ) from error
    return ray
