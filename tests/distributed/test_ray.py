"""A fleet on a real Ray cluster of two nodes: the same tensors whoever works and whoever dies; the bad are found."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from conftest import TINY_RUN, people_of, trust
from tiny import base_of

from mta.bank.bank import Bank
from mta.bank.format import read_info
from mta.config import override
from mta.distributed.executor import LocalExecutor
from mta.distributed.ray import Cluster
from mta.errors import BankMismatch, ClusterError, Diverged, StoreError
from mta.model.base import BaseModel
from mta.personalize import Personalizer, forget_person
from mta.personalize.stages import StagesOpener
from mta.store import Store
from mta.store.state import State

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'merge-then-adapt[ray]'")
PEOPLE = 12
pytestmark = pytest.mark.integration


@contextlib.contextmanager
def nodes():
    """A cluster of two nodes with two CPUs each, and the second of them."""
    from ray.cluster_utils import Cluster as Nodes

    try:
        started = Nodes(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    except Exception as error:  # no shared memory, no free port: Ray has many words for it
        pytest.skip(f"Ray cannot start here: {type(error).__name__}: {error}")
    try:
        second = started.add_node(wait=False, num_cpus=2)
        started.wait_for_nodes(timeout=300)
        yield started, second
    finally:
        ray.shutdown()
        started.shutdown()


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The address of two nodes that nobody kills."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTA_CACHE", str(tmp_path_factory.mktemp("cache")))  # nodes have the environment of now
        with nodes() as (started, _):
            yield started.address


@pytest.mark.parametrize("given", [None, "off", "off:rotate"])
def test_kernels_that_are_switched_off_here_are_off_in_workers(monkeypatch, given):
    monkeypatch.delenv("MTA_KERNELS", raising=False)
    if given:
        monkeypatch.setenv("MTA_KERNELS", given)
    cluster = object.__new__(Cluster)
    cluster.gpus, cluster.threads = 0, 2
    assert cluster._own().get("MTA_KERNELS") == given
    assert cluster._own()["OMP_NUM_THREADS"] == "2"


@dataclass(frozen=True)
class Numbers:
    """A piece of work without people in it."""

    numbers: tuple[int, ...]

    def __len__(self):
        return len(self.numbers)

    def halves(self):
        middle = len(self) // 2
        return tuple(Numbers(part) for part in (self.numbers[:middle], self.numbers[middle:]) if middle)


def context():
    return "made in a worker"


def run(cluster, function, pieces, opener=context):
    """Outcomes by their pieces."""
    return {out.piece.numbers: out for out in cluster.run(function, pieces, SimpleNamespace(opener=opener))}


def doubled(made, piece):
    assert made == "made in a worker"
    return [2 * n for n in piece.numbers]


def test_every_piece_is_done_once_by_workers_that_made_their_own_context(here):
    with Cluster(here, workers=3) as cluster:
        found = run(cluster, doubled, [Numbers((n,)) for n in range(7)])
    assert {numbers: out.result for numbers, out in found.items()} == {(n,): [2 * n] for n in range(7)}
    assert not any(out.error for out in found.values())


def shared(_, piece):
    return os.environ.get("MTA_SHARED")


def test_workers_write_for_the_group_that_the_driver_writes_for(here, monkeypatch):
    for value in ("group", None):
        monkeypatch.setenv("MTA_SHARED", value) if value else monkeypatch.delenv("MTA_SHARED")
        with Cluster(here, workers=1) as cluster:
            assert run(cluster, shared, [Numbers((1,))])[1,].result == value


def spoilt(_, piece):
    """3 raises, 11 takes the worker with it."""
    if 3 in piece.numbers:
        raise ValueError("a text of somebody's\nand its second line")
    if 11 in piece.numbers:
        os.kill(os.getpid(), signal.SIGKILL)
    return sum(piece.numbers)


def test_who_makes_workers_fail_is_found_and_the_others_finish(here):
    with Cluster(here, workers=3, attempts=2) as cluster:
        found = run(cluster, spoilt, [Numbers(tuple(range(6))), Numbers(tuple(range(6, 13))), Numbers((20, 21))])
    failed = {numbers: out.error for numbers, out in found.items() if out.error}
    assert set(failed) == {(3,), (11,)}
    assert failed[3,].splitlines()[0] == "ClusterError: a worker failed: ValueError"
    assert failed[11,].startswith("workers died of it, ")
    assert sorted(n for numbers in found for n in numbers) == [*range(13), 20, 21]


def full(_, piece):
    raise StoreError("no space left", hint="Make room.")


def hopeless(_, piece):
    raise ValueError("the card is broken")


def diverging(_, piece):
    if len(piece) > 1:  # of a single person, the error is a result
        raise Diverged("the training of all people diverged", hint="Lower the rate.")
    return 0


def test_an_error_of_all_people_stops_the_run(here):
    with Cluster(here, workers=1) as cluster:
        with pytest.raises(Diverged, match="all people diverged"):
            run(cluster, diverging, [Numbers((1, 2))])
        with pytest.raises(StoreError, match="no space left"):
            run(cluster, full, [Numbers((1, 2))])
        with pytest.raises(ClusterError, match=r"no person of a cohort of 4 could be computed.*ValueError"):
            run(cluster, hopeless, [Numbers((1, 2, 3, 4))])


def no_context():
    raise BankMismatch("another bank lies here", hint="Give the same folder.")


def dead_context():
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_cannot_begin_stop_the_run(here):
    with Cluster(here, workers=1, attempts=1) as cluster:
        with pytest.raises(BankMismatch, match="another bank lies here"):
            run(cluster, doubled, [Numbers((1,))], no_context)
        with pytest.raises(ClusterError, match="2 workers in a row could not start"):
            run(cluster, doubled, [Numbers((1,))], dead_context)


def test_without_a_cluster_it_is_said_what_to_type():
    with pytest.raises(ClusterError, match=r"no Ray cluster at '127.0.0.1:1': .*\n  Give local"):
        Cluster("127.0.0.1:1")


# -- people ------------------------------------------------------------------------------------------------------------

RUN = override(TINY_RUN, ["encoder=base", "merge={policy: laplace, k: 0}", "stack.training.steps=12"])
BUILD = {"task": "movielens-rating", "task_people": people_of(20, prefix="t", seed=1)}  # enough to hold some out


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A base in a folder, as workers load it; a bank over it; and the states that one process makes, in one thread."""
    folder = tmp_path_factory.mktemp("site")
    made = base_of()
    made.model.save_pretrained(folder / "base")
    made.tokenizer.save_pretrained(folder / "base")
    run = RUN.model_copy(update={"base": str(folder / "base")})
    base = BaseModel.of(run)
    alone = LocalExecutor(most=2)
    Bank.build(base, people_of(12, prefix="c"), folder / "built", run=run, executor=alone, **BUILD)
    trust(shutil.copytree(folder / "built", folder / "bank"))
    bank = Bank.open(folder / "bank", base)
    Personalizer(base, bank, folder / "alone", executor=alone).personalize(people_of(PEOPLE))
    return base, bank, states(folder / "alone")


def states(folder):
    store = Store(folder)
    return {person.id: store.load(person.id).to_bytes() for person in people_of(PEOPLE)}


def personalized(base, bank, store, cluster, on_step=None):
    return Personalizer(base, bank, store, executor=cluster).personalize(people_of(PEOPLE), on_step=on_step)


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_makes_the_same_states(here, site, tmp_path, workers):
    base, bank, alone = site
    reported = []
    with Cluster(here, workers=workers, most=2) as cluster:
        done = personalized(base, bank, tmp_path, cluster, lambda stage, step: reported.append((stage, step.examples)))
    assert (done.trained, done.failed) == (PEOPLE, {})
    assert states(tmp_path) == alone
    assert reported == [("fleet", n) for n in range(2, PEOPLE + 1, 2)]
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_makes_the_same_updates(here, site, tmp_path, workers):
    """A worker loads the earlier stack from the store; gradients of new items are added once."""
    base, bank, _ = site
    alone, apart = contextlib.nullcontext(LocalExecutor(most=2)), Cluster(here, workers=workers, most=2)
    for name, opened in (("alone", alone), ("apart", apart)):
        with opened as executor:
            personal = Personalizer(base, bank, tmp_path / name, executor=executor)
            personal.personalize([person.first(2) for person in people_of(PEOPLE)])
            done = personal.update(people_of(PEOPLE))
        assert (done.refreshed + done.retrained, done.failed) == (PEOPLE, {})
    assert states(tmp_path / "apart") == states(tmp_path / "alone")


def test_a_person_who_is_forgotten_during_a_run_is_not_saved_by_its_workers(here, site, tmp_path):
    base, bank, _ = site
    *_, last = (person.id for person in people_of(PEOPLE))

    def forget(stage, step):
        if step.step == 1:
            forget_person(last, Store(tmp_path))

    with Cluster(here, workers=1, most=2) as cluster:
        done = personalized(base, bank, tmp_path, cluster, forget)
    assert (done.trained, done.failed, done.forgotten) == (PEOPLE - 1, {}, (last,))
    assert last not in Store(tmp_path)
    assert not (tmp_path / "work").exists()


def test_workers_refuse_another_store_or_bank_than_the_drivers(site, tmp_path):
    base, bank, _ = site
    run, store = base.as_loaded(bank.info.run), Store(tmp_path / "people")
    identity = store.identity(write=True)
    here, elsewhere = ((url, identity, frozenset()) for url in (store.files.url, str(tmp_path / "elsewhere")))
    assert StagesOpener(run, bank.folder, bank.hash, here)().session.store.identity() == identity
    with pytest.raises(StoreError, match="another store, or none"):
        StagesOpener(run, bank.folder, bank.hash, elsewhere)()
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(BankMismatch, match="a worker found bank"):
        StagesOpener(run, bank.folder, "0" * 64, here)()


def killed_midway(site, folder):
    """Four workers on two nodes; when the first cohort is done, a whole node is lost with the two workers on it."""
    base, bank, alone = site
    lost = []
    with nodes() as (started, second):

        def lose(stage, step):
            if not lost:
                lost.append(second)
                started.remove_node(second, allow_graceful=False)

        with Cluster(started.address, workers=4, most=2) as cluster:
            done = personalized(base, bank, folder, cluster, lose)
    assert lost
    assert (done.trained, done.failed) == (PEOPLE, {})
    assert states(folder) == alone


@pytest.mark.slow
def test_a_node_that_is_lost_with_its_workers_changes_nothing(site, tmp_path):
    killed_midway(site, tmp_path)


@pytest.mark.slow
def test_a_driver_that_died_is_followed_by_one_that_goes_on_in_the_same_cohorts(here, site, tmp_path):
    base, bank, alone = site

    def die(stage, step):
        raise KeyboardInterrupt

    with Cluster(here, workers=2, most=2) as cluster:
        with pytest.raises(KeyboardInterrupt):
            personalized(base, bank, tmp_path, cluster, die)
        assert (tmp_path / "work").exists()
        done = personalized(base, bank, tmp_path, cluster)
    assert 0 < done.trained < PEOPLE
    assert states(tmp_path) == alone


def poisoned(stages, cohort):
    from mta.personalize.worker import personalize_cohort

    if any(item.person.id == "p7" for item in cohort.items):
        os.kill(os.getpid(), signal.SIGKILL)
    return personalize_cohort(stages, cohort)


def test_a_person_who_makes_workers_die_is_reported_and_the_others_are_personalized(here, site, tmp_path, monkeypatch):
    base, bank, alone = site
    monkeypatch.setattr("mta.personalize.pipeline.personalize_cohort", poisoned)
    with Cluster(here, workers=2, most=4, attempts=2) as cluster:
        done = personalized(base, bank, tmp_path, cluster)
    assert done.trained == PEOPLE - 1
    assert set(done.failed) == {"p7"}
    assert "died" in str(done.failed["p7"])
    store = Store(tmp_path)
    assert "p7" not in store
    for person in people_of(PEOPLE):
        if person.id != "p7":  # in other cohorts than alone, so equal as far as mates do not count
            theirs = State.from_bytes(alone[person.id]).stack.tensors()
            for name, tensor in store.load(person.id).stack.tensors().items():
                assert (tensor - theirs[name]).abs().max() < 1e-10


def test_without_a_store_states_come_back(here, site):
    base, bank, alone = site
    with Cluster(here, workers=2, most=2) as cluster:
        personal = Personalizer(base, bank, executor=cluster)
        personal.personalize(people_of(PEOPLE))
    assert {person.id: personal.state(person.id).to_bytes() for person in people_of(PEOPLE)} == alone


def test_a_bank_built_by_workers_is_the_same_bank(here, site, tmp_path):
    base, bank, _ = site
    steps = []
    with Cluster(here, workers=3, most=2) as cluster:
        built = Bank.build(
            base,
            people_of(12, prefix="c"),
            tmp_path / "bank",
            run=bank.info.run,
            executor=cluster,
            on_step=lambda stage, step: steps.append((stage, step.examples)),
            **BUILD,
        )
    assert built.hash == read_info(bank.folder.parent / "built").hash
    trained = [step for step in steps if step[0] != "calibration"]
    rounds = [("task LoRA", n) for n in range(1, len(trained) - 1)]
    assert trained in [[*rounds, ("anchors", n), ("anchors", 3)] for n in (1, 2)]
    assert len(rounds) > 1
    assert len(trained) < len(steps)
