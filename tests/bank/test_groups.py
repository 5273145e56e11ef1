"""Anchors that are groups of people: assignment, training, resuming, and who is behind them."""

import shutil

import pytest
import torch
from builds import build, changed, files_in, stopped, trained
from conftest import HashEncoder, people_of
from hypothesis import given
from hypothesis import strategies as st
from tiny import base_of

from mta.bank import anchors, groups, rebuild
from mta.bank.bank import Bank
from mta.bank.card import body
from mta.bank.context import BuildContext
from mta.bank.format import read_info
from mta.bank.groups import assigned, coefficients_of, items_of
from mta.bank.notes import mark_stale, parts_to_rebuild
from mta.bank.rebuild import rebuild_groups
from mta.distributed.executor import LocalExecutor
from mta.errors import ConfigError, InputError
from mta.lora.batch import fresh
from mta.lora.layers import Shared
from mta.training.trainer import Job, train_loras

RUN = changed("bank", choose="groups", rounds=1, min_people=2, anchors=3, group_items=12)
CANDIDATES = people_of(32, items=8, prefix="somebody-c")


def grouped(out, run=RUN, **how):
    return build(out, candidates=CANDIDATES, run=run, **how)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return grouped(tmp_path_factory.mktemp("groups") / "bank")


# -- assignment --------------------------------------------------------------------------------------------------------


def metric_of(anchors):
    return torch.eye(anchors, dtype=torch.float64)


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_everybody_is_in_one_group_and_none_is_too_small(people, count, least, seed):
    w = torch.randn(people, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = assigned(w, metric_of(3), count, least, seed)
    assert sorted(row for group in found for row in group) == list(range(people))
    assert len(found) == max(1, min(count, people // least))
    assert len(found) == 1 or min(map(len, found)) >= least
    assert found == sorted(found)


def test_a_distance_is_measured_in_likelihood():
    """Along a flat direction of the likelihood, people do not differ however different their coefficients are."""
    w = torch.tensor([[0.0, 0.0], [9.0, 0.1], [0.0, 1.0], [9.0, 1.1]]).double()
    flat = torch.diag(torch.tensor([1e-6, 1.0])).double()
    assert assigned(w, flat, 2, 1, 0) == [[0, 1], [2, 3]]
    assert assigned(w, metric_of(2), 2, 1, 0) == [[0, 2], [1, 3]]


def test_coefficients_follow_what_both_halves_of_a_persons_items_agree_on():
    generator = torch.Generator().manual_seed(0)
    people, anchors = 400, 3
    taste = torch.where(torch.arange(people) % 2 == 0, 1.0, -1.0).double()
    counts = torch.randint(3, 9, (people, 2), generator=generator).double()
    noise = torch.randn(people, 2, anchors, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5])
    halves = noise * counts.sqrt()[..., None]
    halves[..., 0] += taste[:, None] * counts
    w, metric = coefficients_of(halves, counts)
    curvature = metric - torch.eye(anchors) * 0.3 * (metric.diagonal().mean() / 1.3)
    torch.testing.assert_close(curvature.diagonal(), torch.tensor([1.0, 4.0, 0.25]).double(), rtol=0.15, atol=0)
    assert float((w[:, 0].sign() == taste).double().mean()) > 0.97
    two = assigned(w, metric, 2, 4, 0)
    assert max(sum(taste[row] > 0 for row in group) / len(group) for group in two) > 0.97


def test_a_person_without_a_finite_gradient_spoils_nobodys_group(tmp_path, monkeypatch):
    plain = groups.CalibrationWorker.sums
    lost = torch.tensor([0])
    monkeypatch.setattr(groups.CalibrationWorker, "sums", lambda *given: plain(*given).index_fill(0, lost, torch.nan))
    info = read_info(grouped(tmp_path / "bank", changed("calibration", RUN, enabled=False)))
    assert sum(info.people) == len(CANDIDATES)


def test_settings_of_groups_that_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"^3 of 4 candidates for anchors have 3 items or more"):
        build(tmp_path / "bank", candidates=CANDIDATES[:4], run=RUN)
    off = changed("calibration", RUN, enabled=False)
    for how in ({"sizes": (2, 3)}, {"rounds": 2}):
        for run in (off, changed("bank", RUN, choose="active"), changed("calibration", RUN, people=7)):
            with pytest.raises(ConfigError, match=r"need groups, and 8 people who calibrate them; [07] are left"):
                grouped(tmp_path / "bank", changed("bank", run, **how))
    monkeypatch.setattr(anchors, "calibration_people", lambda *_: CANDIDATES[:7])  # others are copies of members
    with pytest.raises(ConfigError, match="7 are left"):
        grouped(tmp_path / "bank", changed("bank", RUN, sizes=(2, 3)))
    assert not (tmp_path / "bank").exists()


def test_memory_is_planned_for_the_gradients_of_groups_without_a_calibration(tmp_path, monkeypatch):
    planned = []
    monkeypatch.setattr("mta.bank.build.size_of_passes", lambda base, subjects, *_, **__: planned.extend(subjects))
    grouped(tmp_path / "bank", changed("calibration", RUN, enabled=False))
    assert planned


# -- training ----------------------------------------------------------------------------------------------------------


def test_a_group_trained_with_others_equals_the_same_alone(tmp_path, monkeypatch):
    jobs, plain = {}, BuildContext.job
    monkeypatch.setattr(BuildContext, "job", lambda self, key, *of: jobs.setdefault(key, plain(self, key, *of)))
    out, base = grouped(tmp_path / "bank", changed("calibration", RUN, enabled=False)), base_of()
    bank, run = Bank.open(out, base), RUN
    assert len(bank) > 1
    for n in range(len(bank)):
        job = jobs[f"group-{n}"]
        start = fresh(base.targets, run.bank.lora.rank, run.bank.lora.scale, run.seed, ["bank"], base.master_dtype)
        alone = train_loras(base, [job], start, run.bank.training, frozen=[Shared(bank.task_lora)], seed=run.seed)
        for name, tensor in alone.tensors().items():
            torch.testing.assert_close(bank.anchors.tensors()[name][n : n + 1], tensor, rtol=0, atol=1e-10)


def test_all_but_those_who_calibrate_are_behind_groups(built):
    info = read_info(built)
    parts = [info.members.parts_of(person.id) for person in CANDIDATES]
    assert sum("calibration" in one for one in parts) == 8
    assert all(("anchor" in one) != ("calibration" in one) for one in parts)
    assert sum(info.people) == info.members.anchors == 24
    assert min(info.people) >= RUN.bank.min_people
    assert max(info.items) <= RUN.bank.group_items
    behind = [person.id for person in CANDIDATES if info.members.trained(person.id, "anchor")]
    anchors = [info.members.anchors_of(id) for id in behind]
    assert [anchors.count([n]) for n in range(len(info.people))] == [*info.people]
    assert info.members.anchors_of("nobody") == []


def gaining(monkeypatch, *values):
    gains = iter(values)
    monkeypatch.setattr(groups, "_gain_outside", lambda *_: next(gains))


def test_groups_are_formed_again_only_while_people_outside_gain(tmp_path, monkeypatch):
    run = changed("calibration", RUN, steps=1)
    gaining(monkeypatch, 0.1, 0.2, 0.15)
    out = grouped(tmp_path / "four", changed("bank", run, rounds=4))
    assert [gain for _, gain in read_info(out).tried] == [0.1, 0.2, 0.15]
    gaining(monkeypatch, 0.1, 0.2)
    twice = grouped(tmp_path / "two", changed("bank", run, rounds=2))
    assert trained(out)["anchors.safetensors"] == trained(twice)["anchors.safetensors"]
    assert read_info(grouped(tmp_path / "one", run)).tried == ()


def test_the_number_of_groups_is_chosen_on_people_outside(tmp_path, monkeypatch):
    run = changed("calibration", RUN, steps=1)
    gaining(monkeypatch, 0.1, 0.3)
    info = read_info(grouped(tmp_path / "sizes", changed("bank", run, sizes=(1, 3))))
    assert info.tried == ((1, 0.1), (len(info.items), 0.3))
    assert len(info.items) > 1
    assert f"1 groups +0.1000, {len(info.items)} groups +0.3000" in body(info)
    assert "The number of groups or rounds was chosen on these people too" in body(info)
    gaining(monkeypatch, 0.3, 0.1)
    assert len(read_info(grouped(tmp_path / "one", changed("bank", run, sizes=(1, 3)))).items) == 1


@pytest.mark.parametrize(("stage", "at"), [("groups", 2), ("anchors", 2), ("anchors", 10), ("calibration", 1)])
def test_a_resumed_build_equals_an_uninterrupted_one(built, tmp_path, stage, at):
    stopped(tmp_path / "bank", stage, at, candidates=CANDIDATES, run=RUN)
    grouped(tmp_path / "bank")
    assert trained(tmp_path / "bank") == trained(built)
    assert not (tmp_path / "bank" / "work").exists()


def test_no_result_of_other_groups_is_taken(tmp_path, monkeypatch):
    """Another machine may group people otherwise."""
    stopped(tmp_path / "bank", "calibration", 4, candidates=CANDIDATES, run=RUN)
    plain = groups.assigned

    def otherwise(*given):
        (one, *first), *others = plain(*given)
        return [first, *others[:-1], [*others[-1], one]]

    monkeypatch.setattr(groups, "assigned", otherwise)
    assert trained(grouped(tmp_path / "bank")) == trained(grouped(tmp_path / "other"))


class Backwards(LocalExecutor):
    """Results come in another order, as from several workers."""

    def run(self, function, pieces, opener):
        return reversed(list(super().run(function, pieces, opener)))


def test_groups_do_not_depend_on_the_order_in_which_workers_finish(built, tmp_path):
    assert trained(grouped(tmp_path / "bank", executor=Backwards())) == trained(built)


def test_no_file_contains_ids(built):
    assert not [name for name, data in files_in(built).items() if b"somebody-" in data]


# -- forgetting --------------------------------------------------------------------------------------------------------


def forgotten(built, folder, *people):
    shutil.copytree(built, folder)
    for person in people:
        mark_stale(folder, person.id)
    return folder


def behind(folder, number):
    members = read_info(folder).members
    return [person for person in CANDIDATES if number in members.anchors_of(person.id)]


def test_only_the_groups_of_forgotten_people_are_trained_anew(built, tmp_path):
    base, gone = base_of(), behind(built, 1)[0]
    folder = forgotten(built, tmp_path / "bank", gone)
    people = [person for person in CANDIDATES if person is not gone]
    (folder / "config.yaml").write_text("seed: 0\n")
    rebuild_groups(folder, base, people, HashEncoder(), tmp_path / "new", RUN)
    assert (tmp_path / "new" / "config.yaml").read_text() == "seed: 0\n"
    old, new = Bank.open(folder, base), Bank.open(tmp_path / "new", base)
    for name, tensor in new.anchors.tensors().items():
        same = [torch.equal(*pair) for pair in zip(tensor, old.anchors.tensors()[name])]
        assert [n for n, one in enumerate(same) if not one] in ([1], [])
    assert not torch.equal(new.anchors.delta(name_of(new))[1], old.anchors.delta(name_of(old))[1])
    left = [person for person in behind(built, 1) if person is not gone]
    items = items_of(left, RUN)
    job = Job("group-1", [base.prompts.example(new.task, item) for item in items])
    start = fresh(base.targets, RUN.bank.lora.rank, RUN.bank.lora.scale, RUN.seed, ["bank"], base.master_dtype)
    alone = train_loras(base, [job], start, RUN.bank.training, frozen=[Shared(new.task_lora)], seed=RUN.seed)
    for name, tensor in alone.tensors().items():
        torch.testing.assert_close(new.anchors.tensors()[name][1:2], tensor, rtol=0, atol=1e-10)
    assert not new.info.members.trained(gone.id, "anchor")
    assert "anchor" not in parts_to_rebuild(new.folder)
    assert "clusters" in parts_to_rebuild(new.folder)
    assert new.info.people[1] == old.info.people[1] - 1
    assert new.info.items == (old.info.items[0], len(items), *old.info.items[2:])
    assert "1 of" in new.info.calibration.notes[-1]


def name_of(bank):
    return bank.anchors.names[0]


def test_who_is_forgotten_during_a_rebuild_stays_marked(built, tmp_path, monkeypatch):
    (gone, late), base, plain = (behind(built, n)[0] for n in (1, 0)), base_of(), rebuild.train_piece
    folder = forgotten(built, tmp_path / "bank", gone)
    monkeypatch.setattr(rebuild, "train_piece", lambda *given: mark_stale(folder, late.id) and plain(*given))
    rebuild_groups(folder, base, CANDIDATES, HashEncoder(), tmp_path / "new", RUN)
    assert "anchor" in parts_to_rebuild(tmp_path / "new")
    members = read_info(tmp_path / "new").members
    assert (members.trained(gone.id, "anchor"), members.trained(late.id, "anchor")) == (False, True)


def test_a_group_without_anybody_left_is_zero(built, tmp_path):
    folder, base = forgotten(built, tmp_path / "bank", *behind(built, 0)), base_of()
    rebuild_groups(folder, base, CANDIDATES, HashEncoder(), tmp_path / "new", RUN)
    new = Bank.open(tmp_path / "new", base)
    assert not any(new.anchors.delta(name)[0].any() for name in new.anchors.names)
    assert new.info.people[0] == 0


def test_a_rebuild_needs_marks_and_everybody_who_is_left(built, tmp_path):
    base, gone, other = base_of(), *behind(built, 0)[:2]
    with pytest.raises(InputError, match=r"no group of .* is marked"):
        rebuild_groups(built, base, CANDIDATES, HashEncoder(), tmp_path / "new", RUN)
    folder = forgotten(built, tmp_path / "bank", gone)
    left = [one for one in CANDIDATES if one is not other]
    for people, why in ((left, "1 people of the marked groups are not given"), ([*CANDIDATES, gone], "twice")):
        with pytest.raises(InputError, match=why):
            rebuild_groups(folder, base, people, HashEncoder(), tmp_path / "new", RUN)
    assert not (tmp_path / "new").exists()
