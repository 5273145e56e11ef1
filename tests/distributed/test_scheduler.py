"""The scheduler of pieces with a cluster that is made up: which workers it starts, and when it gives up."""

from types import SimpleNamespace

import pytest

from mta.distributed.executor import Piece
from mta.distributed.ray import Cluster, PieceScheduler, Worker, WorkerPool
from mta.errors import ClusterError
from mta.system.provenance import sources_digest


def test_a_worker_takes_a_gpu_if_there_is_one_and_it_is_not_unwanted(monkeypatch):
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 4, "GPU": 2}, shutdown=lambda: None)
    monkeypatch.setattr("mta.distributed.ray._connected", lambda *_: ray)
    assert [(one.gpus, one.workers) for one in (Cluster(gpu=False), Cluster())] == [(0, 4), (1, 2)]


class Died(Exception):
    """What Ray raises when a worker died."""


class One(Piece):
    """A piece of one person."""

    def __len__(self):
        return 1


class Ray:
    """References are functions that return a result or raise."""

    exceptions = SimpleNamespace(RayError=Died, RayTaskError=type("TaskError", (Died,), {}))

    def put(self, value):
        return value

    def get(self, ref):
        return ref()

    def wait(self, refs, num_returns, timeout):
        return [min(refs, key=lambda ref: ref.turn)], []

    def kill(self, worker):
        pass


def opened_by(opener):
    """A context that workers open by this function."""
    return SimpleNamespace(opener=opener)


def made_up_cluster(good, workers, attempts=2):
    """A cluster whose workers after the first ``good`` cannot start; results come after all starts."""
    hired = []

    def call(turn, result):
        def ref():
            if isinstance(result, Exception):
                raise result
            return result

        ref.turn = turn
        return ref

    def start_worker():
        hired.append(None)
        fails = len(hired) > good
        worker = SimpleNamespace(open=SimpleNamespace(), run=SimpleNamespace())
        worker.open.remote = lambda made: call(len(hired), Died() if fails else None)
        worker.run.remote = lambda function, piece: call(1000, "done")
        return worker

    return SimpleNamespace(
        ray=Ray(), workers=workers, attempts=attempts, start_worker=start_worker, stop=lambda _: None
    ), hired


def test_a_machine_on_which_no_worker_starts_does_not_stop_the_others():
    cluster, hired = made_up_cluster(good=1, workers=2)
    found = list(PieceScheduler(cluster, None, WorkerPool(None, None)).work_through([One() for _ in range(40)]))
    assert [one.result for one in found] == ["done"] * 40
    assert len(hired) == 1 + 2 * 2 + 1  # it has stopped trying


@pytest.mark.parametrize("workers", [2, 64])
def test_workers_that_all_cannot_start_end_the_run(workers):
    cluster, _ = made_up_cluster(good=0, workers=workers)
    with pytest.raises(ClusterError, match="3 workers in a row could not start"):
        list(PieceScheduler(cluster, None, WorkerPool(None, None)).work_through([One()]))


def test_a_piece_that_kills_every_worker_fails_although_their_names_come_again():
    def died():
        raise Died

    died.turn = 0
    worker = SimpleNamespace(open=SimpleNamespace(), run=SimpleNamespace(remote=lambda function, piece: died))
    opened = lambda: None  # noqa: E731
    opened.turn = 0
    worker.open.remote = lambda made: opened
    cluster = SimpleNamespace(ray=Ray(), workers=1, attempts=2, start_worker=lambda: worker, stop=lambda _: None)
    (found,) = PieceScheduler(cluster, None, WorkerPool(None, None, idle=[worker])).work_through([One()])
    assert found.error == "workers died of it, Died"


def test_a_worker_that_died_takes_its_idle_neighbours_along():
    """They may have died with their machine: a piece would lose its attempts to them."""
    cluster, hired = made_up_cluster(good=1000, workers=3)
    dead = cluster.start_worker()

    def died():
        raise Died

    died.turn = 0
    dead.run.remote = lambda function, piece: died
    pool = WorkerPool(None, None, idle=[dead, dead, dead])
    assert [one.result for one in PieceScheduler(cluster, None, pool).work_through([One()])] == ["done"]
    assert len(hired) == 2


@pytest.fixture
def three(monkeypatch):
    """A cluster of three workers, and those that were hired and stopped."""
    made_up, hired = made_up_cluster(good=1000, workers=3)
    cluster = object.__new__(Cluster)
    cluster.ray, cluster.workers, cluster.attempts, cluster.start_worker = Ray(), 3, 2, made_up.start_worker
    cluster.pool, cluster.gpus, cluster.threads = None, 0, 1
    stopped = []
    monkeypatch.setattr(Ray, "kill", lambda _, worker: stopped.append(worker))
    return cluster, hired, stopped


def test_pieces_that_need_the_cluster_leave_no_idle_workers(three):
    """As those of an experiment, which builds a bank before the people are computed with it."""
    cluster, hired, stopped = three
    running = []

    def pieces():
        yield from [One(), One(), One()]
        list(cluster.run(None, [One(), One(), One()], opened_by(lambda: "of the bank")))

    for _ in cluster.run(None, pieces(), opened_by(lambda: "of people")):
        running.append(len(hired) - len(stopped))
    assert max(running) <= 3


def test_workers_stay_for_the_next_passes_over_the_same_context(three):
    """As in a calibration, which asks for many passes: a new worker loads the base again."""
    cluster, hired, stopped = three
    first, second = (lambda: None), (lambda: None)
    for opener, count, left in ((first, 3, 0), (first, 3, 0), (second, 6, 3)):
        found = list(cluster.run(None, [One() for _ in range(5)], opened_by(opener)))
        assert [one.result for one in found] == ["done"] * 5
        assert (len(hired), len(stopped)) == (count, left)
    cluster.dismiss()
    assert len(stopped) == 6


def test_a_worker_refuses_a_driver_with_other_sources(tmp_path, monkeypatch):
    monkeypatch.setattr("mta.distributed.ray.keep_freed_memory", lambda: None)
    worker = Worker()
    worker.open((sources_digest(), lambda: "context"))
    assert worker.context == "context"
    with pytest.raises(
        ClusterError, match=r"other sources of mta .* expected 000000000000…\n  Install the same version"
    ):
        worker.open(("0" * 64, lambda: "another"))
    (tmp_path / "sub").mkdir()
    digests = set()
    for name, content in (("a.py", ""), ("a.py", "1"), ("sub/b.py", "1"), ("sub/b.py", "2")):
        (tmp_path / name).write_text(content)
        monkeypatch.setattr("mta.system.provenance._PACKAGE", tmp_path)
        digests.add(sources_digest.__wrapped__())
    assert len(digests) == 4
