"""Writers that race, are killed, or find no hard links: whole versions, one winner each."""

import multiprocessing
import os
import shutil
import signal
import threading
from pathlib import Path

import kill
import pytest
from files import folder_of
from stores import ANN, everything, person, state

from mta.errors import StateCorrupt, StoreConflict
from mta.personalize.forgetting import forget_person
from mta.store import Store
from mta.store.maintenance import check


class Slow(Store):
    """Looks for the latest version, then waits for the others: every writer goes for the same number."""

    def __init__(self, url: str | Path, barrier: threading.Barrier) -> None:
        super().__init__(url)
        self.barrier = barrier

    def latest(self, id: str) -> int | None:
        found = super().latest(id)
        self.barrier.wait(60)
        return found


def race(url: str, barrier: threading.Barrier, seed: int, results: object) -> None:
    store = Slow(url, barrier)
    for round in range(5):
        try:
            results.put((round, seed, store.save(f"p{round}", state(seed))))
        except StoreConflict as error:
            results.put((round, seed, str(error)))


@pytest.mark.parametrize(
    "kind", ["threads", *(pytest.param(kind, marks=pytest.mark.integration) for kind in ("processes", "s3"))]
)
def test_exactly_one_of_racing_writers_wins(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    context = multiprocessing.get_context("spawn")
    url = f"{request.getfixturevalue('bucket')}/{tmp_path.name}" if kind == "s3" else str(tmp_path)
    if kind != "processes":
        barrier, results = threading.Barrier(3), context.SimpleQueue()
        workers = [threading.Thread(target=race, args=(url, barrier, n, results)) for n in range(3)]
    else:
        barrier, results = context.Barrier(3), context.Queue()
        workers = [context.Process(target=race, args=(url, barrier, n, results)) for n in range(3)]
    for worker in workers:
        worker.start()
    rows = [results.get() for _ in range(15)]
    for worker in workers:
        worker.join()
    store = Store(url)
    for round in range(5):
        mine = [(seed, result) for number, seed, result in rows if number == round]
        winners = [seed for seed, result in mine if result == 1]
        assert len(winners) == 1
        assert store.load(f"p{round}") == state(winners[0])
        assert store.versions(f"p{round}") == [1]
        for _, result in mine:
            assert result == 1 or result == (
                f"version 1 of 'p{round}' was created by another writer meanwhile; this state was not saved\n"
                "  Save again: it becomes version 2."
            )
    assert not [path for path, _ in everything(tmp_path) if path.name.startswith(".")]


def test_writers_of_the_same_work_all_win(url: str) -> None:
    store, late = Store(url), Store(url)
    late.latest = lambda id: None  # looked before the other wrote
    assert store.save(ANN, state(0)) == 1
    assert late.save(ANN, state(0)) == 1
    with pytest.raises(StoreConflict, match="version 1 of"):
        late.save(ANN, state(1))
    assert store.load(ANN) == state(0)


def test_first_writers_agree_on_one_key(tmp_path: Path) -> None:
    barrier, keys = threading.Barrier(8), []

    def first() -> None:
        store = Store(tmp_path)
        barrier.wait()
        keys.append(folder_of(store, ANN))

    threads = [threading.Thread(target=first) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert len(set(keys)) == 1


def test_a_damaged_history_is_saved_anew(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save_history(person())
    next(tmp_path.rglob("history.json")).write_bytes(b"{")
    with pytest.raises(StateCorrupt):
        store.session(ANN).change_history(ANN, lambda: store.history(ANN) or person())
    store.save_history(person())
    assert store.history(ANN) == person()


def test_a_killed_writer_leaves_only_a_temporary_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(ANN, state(0))

    def writing() -> None:
        os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        Store(tmp_path).save(ANN, state(1))

    assert kill._attempt(writing) == -signal.SIGKILL
    assert [path for path, _ in everything(tmp_path) if path.name.startswith(".1") or path.name.startswith(".2")]
    assert (store.versions(ANN), store.load(ANN), check(store).people) == ([1], state(0), 1)
    assert store.save(ANN, state(1)) == 2
    assert forget_person(ANN, store).states_removed
    assert [path.name for path, content in everything(tmp_path) if content] == ["store.json"]


def test_a_store_that_was_created_anew_gets_its_new_key(tmp_path: Path) -> None:
    running = Store(tmp_path / "people")
    running.save(ANN, state(0))
    shutil.rmtree(tmp_path / "people")
    Store(tmp_path / "people").save("bob", state(1))
    running.save(ANN, state(2))
    assert Store(tmp_path / "people").load(ANN) == state(2)
    forget_person(ANN, Store(tmp_path / "people"))
    assert check(running).states == 1  # bob's
