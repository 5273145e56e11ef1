"""The task LoRA: a few items of each person, independent of their order; trained while held-out people gain."""

import random
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from builds import CANDIDATES, TASK_PEOPLE, UNCALIBRATED, build, changed, stopped, trained
from conftest import people_of, stopped_when
from hypothesis import given
from hypothesis import strategies as st
from tiny import base_of

from mta.bank import add_calibration
from mta.bank import build as build_module
from mta.bank.bank import Bank
from mta.bank.format import read_info
from mta.bank.task_lora import pooled_candidates, pooled_items
from mta.config import Run, TaskLoraSettings, Training
from mta.data.history import Item, Person
from mta.data.tasks import load_task
from mta.errors import BankError, ConfigError, InputError
from mta.lora.batch import LoraBatch, fresh, join
from mta.lora.peft import read_peft
from mta.tracking.run_folder import sittings
from mta.training.trainer import Job, train_loras


def people(*sizes: int) -> list[Person]:
    return [
        Person(f"p{n}", tuple(Item({"who": f"p{n}", "what": str(i)}) for i in range(size)))
        for n, size in enumerate(sizes)
    ]


def pool(people, seed=0, **settings) -> list[tuple[str, str]]:
    items, _ = pooled_items(people, TaskLoraSettings(**settings), seed)
    return [(item.fields["who"], item.fields["what"]) for item in items]


def counts(pooled) -> Counter:
    return Counter(who for who, _ in pooled)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 20), st.integers(1, 5), st.integers(0, 3))
def test_the_pool_is_bounded_per_person_and_in_all_and_as_even_as_it_can_be(sizes, items, per_person, seed):
    found = pool(people(*sizes), seed, items=items, per_person=per_person)
    theirs = counts(found)
    able = {f"p{n}": min(size, per_person) for n, size in enumerate(sizes)}
    assert len(set(found)) == len(found) == min(items, sum(able.values()))
    most = max(theirs.values(), default=0)
    assert most <= per_person
    assert all(theirs[who] >= min(most - 1, able[who]) for who in able)


def test_the_pool_does_not_depend_on_the_order_of_people():
    given, first = people(5, 2, 9, 4), pool(people(5, 2, 9, 4), items=9, per_person=3)
    for seed in range(4):
        random.Random(seed).shuffle(given)
        assert pool(given, items=9, per_person=3) == first


def test_another_person_does_not_change_the_choice_of_items_of_the_rest():
    few, more = pool(people(9, 9), per_person=2), pool(people(9, 9, 9), per_person=2)
    assert [entry for entry in more if entry[0] != "p2"] == few


@pytest.mark.parametrize("groups", [19, 20, 45])
def test_a_tenth_of_the_people_is_held_out_with_those_who_share_items(groups):
    twins = [replace(one, group=f"g{n // 2}") for n, one in enumerate(people(*[3] * (2 * groups)))]
    pools = pooled_items(twins, TaskLoraSettings(rounds=2), 0)
    trained, tested = ({int(item.fields["who"][1:]) // 2 for item in pool} for pool in pools)
    assert len(tested) == (groups // 10 if groups > 19 else 0)
    assert not trained & tested
    assert len(trained) + len(tested) == groups


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.sets(st.integers(0, 5)), st.integers(2, 9))
def test_candidates_train_the_task_lora_but_for_what_they_keep_back(sizes, anchors, unseen):
    candidates, ids = people(*sizes), {f"p{n}" for n in anchors}
    found = {person.id: person.items for person in pooled_candidates(candidates, ids, TaskLoraSettings(unseen=unseen))}
    for person in candidates:
        assert found.get(person.id, ()) == person.items[0 if person.id in ids else unseen :]
    assert pooled_candidates(candidates, ids, TaskLoraSettings(unseen=None)) == []
    assert pooled_candidates(candidates, ids, TaskLoraSettings(enabled=False, unseen=unseen)) == []


def test_a_later_copy_of_an_item_that_is_kept_back_trains_nothing():
    (person,) = people(5)
    twice = replace(person, items=(*person.items, replace(person.items[1], time=9.0)))
    (found,) = pooled_candidates([twice], set(), TaskLoraSettings(unseen=2))
    assert found.items == person.items[2:]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.integers(0, 3))
def test_only_task_people_are_held_out(sizes, seed):
    own = people(*[3] * 20)
    others = [replace(person, id=f"c{person.id}") for person in people(*sizes)]
    trained, tested = pooled_items(own, TaskLoraSettings(), seed, candidates=others)
    assert {id(item) for item in tested} < {id(item) for person in own for item in person.items}
    assert {id(item) for person in others for item in person.items} <= {id(item) for item in trained}
    assert len(trained) + len(tested) == 60 + sum(sizes)


def test_nothing_that_is_measured_trains_the_task_lora(tmp_path, cache, monkeypatch):
    candidates, run = people_of(12, items=9, prefix="c", seed=5), changed("task_lora", unseen=4)
    used = {}

    def watch(place, name):
        function = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *given, **how: (used.update({name: given}), function(*given, **how))[1])

    watch(build_module, "pooled_items")
    watch(build_module, "calibrate")
    bank = Bank.open(build(tmp_path / "bank", candidates=candidates, run=run), base_of())
    task_people, *_, others = used["pooled_items"]
    trained = {id(item) for person in (*task_people, *others) for item in person.items}
    measured = {person.id: person.items for person in used["calibrate"][4]}
    assert not trained & {id(item) for items in measured.values() for item in items}
    assert measured == {p.id: p.items[:4] for p in candidates if p.id in measured}
    anchors = [one for one in candidates if "anchor" in bank.info.members.parts_of(one.id)]
    assert len(trained) == sum(len(one.items) for one in [*TASK_PEOPLE, *anchors]) + 9 * 5  # nine others leave four

    watch(add_calibration, "calibrate")
    bank = bank.calibrate(base_of(), [*TASK_PEOPLE, *candidates], tmp_path / "copy", run=run)
    assert {person.id: person.items for person in used["calibrate"][4]} == measured

    # Another file lacks somebody's first item, and has grown: the task LoRA saw what is now among the first.
    changed_one, grown = next(p for p in candidates if p.id in measured), people_of(1, items=3, prefix="new")[0].items
    now = [replace(p, items=p.items[1:] if p is changed_one else (*p.items, *grown)) for p in candidates]
    bank.calibrate(base_of(), [*TASK_PEOPLE, *now], tmp_path / "next", run=run)
    again = {person.id: person.items for person in used["calibrate"][4]}
    assert changed_one.id not in again
    assert again == {one.id: one.items[:4] for one in candidates if one.id in again}


def test_candidates_with_too_few_items_for_an_anchor_train_like_task_people(tmp_path):
    few = people_of(5, items=2, prefix="few", seed=7)
    run = changed("bank", UNCALIBRATED, min_items=3)
    members = read_info(build(tmp_path / "bank", candidates=[*CANDIDATES, *few], run=run)).members
    assert [members.parts_of(person.id) for person in few] == [["task LoRA"]] * 5


def test_a_calibration_needs_as_many_items_as_candidates_keep_back(tmp_path):
    with pytest.raises(ConfigError, match=r"candidates keep 2 items back; .* are needed\n  Set task_lora.unseen="):
        build(tmp_path / "bank", run=changed("task_lora", unseen=2))


# -- training ----------------------------------------------------------------------------------------------------------


def test_the_task_lora_is_an_ordinary_adapter_folder(built):
    adapter = read_peft(built / "task_lora")
    assert adapter.shapes == base_of().targets
    assert (adapter.rank, adapter.scale) == (2, 8.0)


def plain_rounds(people, run: Run, count: int) -> LoraBatch:
    """The task LoRA after ``count`` rounds, one after another, as a user of the trainer would write it."""
    base, task, settings = base_of(), load_task("movielens-rating"), run.task_lora
    items, _ = pooled_items(sorted(people, key=lambda one: one.id), settings, run.seed)
    examples = [base.prompts.example(task, item) for item in items]
    lora = fresh(base.targets, settings.lora.rank, settings.lora.scale, run.seed, ["task"], base.master_dtype)
    for key in ["task", *(f"task-{n}" for n in range(1, 9))][:count]:
        lora = train_loras(base, [Job(key, examples)], lora, settings.training, seed=run.seed)
    return lora


@pytest.mark.parametrize(("items", "lr", "to_the_end"), [(16, 5e-4, True), (2, 0.2, False)])
def test_the_task_lora_is_trained_on_while_held_out_people_gain(tmp_path, items, lr, to_the_end):
    people, training = people_of(20, prefix="somebody-t"), Training(lr=lr, epochs=4, batch_size=4)
    run = changed("task_lora", UNCALIBRATED, rounds=3, items=items, training=training, unseen=None)
    steps = []
    out = build(tmp_path / "bank", people, run=run, on_step=lambda *step: steps.append(step))
    losses = sittings(out)[0]["held-out losses of the task LoRA"]
    best = losses.index(min(losses))
    assert len(losses) == min(best + 2, 3)
    counts = [(step.examples, step.examples_total) for stage, step in steps if stage == "task LoRA"]
    total = counts[0][1]
    assert counts == sorted(counts)
    assert (counts[-1][0], total % 3) == (len(losses) * total // 3, 0)
    assert losses[: best + 1] == sorted(losses[: best + 1], reverse=True)
    assert (best == 2) == to_the_end
    found, plain = read_peft(out / "task_lora").tensors(), plain_rounds(people, run, best + 1).tensors()
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=1e-5, atol=1e-7)


def test_a_build_that_was_killed_between_rounds_ends_with_the_same_bank(tmp_path):
    people, run = people_of(20, prefix="somebody-t"), changed("task_lora", UNCALIBRATED, rounds=3)
    whole = build(tmp_path / "whole", people, run=run)
    for place in (3, 7, 11):
        steps = iter(range(place))
        with stopped_when(lambda stage, step, left=steps: next(left, None) is None) as stop:
            build(tmp_path / "killed", people, run=run, on_step=stop)
    assert trained(build(tmp_path / "killed", people, run=run)) == trained(whole)


def test_without_stage_0_there_is_no_task_lora(tmp_path, cache):
    out = build(tmp_path / "bank", run=changed("task_lora", UNCALIBRATED, enabled=False))
    bank = Bank.open(out, base_of())
    assert not (out / "task_lora").exists()
    assert bank.task_lora is None
    assert bank.task_adapters == []


def test_over_a_task_lora_that_is_there_the_anchors_are_the_same(built, tmp_path):
    stages = []
    again = build(tmp_path, task_lora=built / "task_lora", on_step=lambda stage, _: stages.append(stage))
    assert {*stages} == {"anchors", "calibration"}
    assert trained(again) == trained(built)
    assert read_info(again).work != read_info(built).work
    build(tmp_path, task_lora=built / "task_lora", on_step=lambda *_: pytest.fail("it was finished"))
    other = build(tmp_path / "other", run=changed("task_lora", UNCALIBRATED, items=4))
    with pytest.raises(BankError):
        build(tmp_path, task_lora=other / "task_lora")


def test_adapters_of_different_layers_are_not_joined(built):
    """One would hide the other's layers."""
    whole = read_peft(built / "task_lora")
    some = dict(list(whole.factors.items())[:2])
    with pytest.raises(InputError, match="adapters of different layers"):
        join([whole, replace(whole, factors=some)])


def test_a_build_that_starts_over_without_a_task_lora_leaves_none(tmp_path):
    stopped(tmp_path / "bank")
    assert (tmp_path / "bank" / "task_lora").exists()
    shutil.rmtree(tmp_path / "bank" / "work")
    build(tmp_path / "bank", run=changed("task_lora", UNCALIBRATED, enabled=False))
    assert not (tmp_path / "bank" / "task_lora").exists()
