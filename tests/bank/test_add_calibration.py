"""Calibrating a finished bank: what changes, what does not, and that a forgotten person is not in it."""

import json
import shutil
from dataclasses import replace

import pytest
from builds import UNCALIBRATED, build, files_in
from conftest import people_of
from tiny import base_of

import mta
from mta.bank import add_calibration, format
from mta.bank.calibration.people import calibration_people
from mta.bank.format import read_info, verify
from mta.bank.notes import mark_stale, parts_to_rebuild
from mta.config import CalibrationSettings, Run, override
from mta.data.history import Item, Person
from mta.data.tasks import load_task
from mta.errors import BankError, ConfigError, DataError, InputError, OtherBank
from mta.personalize import forget_person

RUN = Run(calibration=CalibrationSettings(people=8, shots=3, queries=2, steps=1))
OTHERS = people_of(9, prefix="other-")


@pytest.fixture(scope="module")
def uncalibrated(tmp_path_factory):
    return build(tmp_path_factory.mktemp("uncalibrated") / "bank", run=UNCALIBRATED)


@pytest.fixture
def folder(uncalibrated, tmp_path, cache):
    shutil.copytree(uncalibrated, tmp_path / "written" / "bank")
    return tmp_path / "written"


@pytest.fixture(scope="module")
def after(uncalibrated):
    return calibrated(uncalibrated.parent, base_of())


@pytest.fixture
def copy(after, folder, base):
    """A calibrated copy of the bank, beside it."""
    return mta.Bank.open(shutil.copytree(after.folder, folder / "copy"), base)


@pytest.fixture
def base():
    return base_of()


def calibrated(folder, base, people=OTHERS, out="copy", **how) -> mta.Bank:
    return mta.Bank.open(folder / "bank", base).calibrate(base, people, folder / out, run=RUN, **how)


def test_a_calibrated_copy_has_the_trained_files_of_its_bank_which_stays(folder, base):
    before, files = mta.Bank.open(folder / "bank", base), files_in(folder / "bank")
    after = calibrated(folder, base)
    verify(folder / "copy", after.info, full=True)
    assert (before.calibration, after.hash != before.hash) == (None, True)
    assert after.calibration.info == after.info.calibration
    assert after.calibration.info.people == 8
    assert {name: after.info.files[name] for name in before.info.files} == before.info.files
    assert "What to expect" in (folder / "copy" / "README.md").read_text()
    assert (folder / "copy" / "config.yaml").exists()
    assert files_in(folder / "bank") == files
    assert {path.name for path in folder.iterdir()} == {"bank", "copy"}


def test_people_are_personalized_by_one_gradient_after_a_calibration(folder, base, monkeypatch):
    for name, found in (("prior_of", 8.0), ("best_on_average", 2)):  # random people may not differ
        monkeypatch.setattr(f"mta.bank.calibration.crossfit.{name}", lambda *_, found=found: found)
    bank, run = mta.Bank.open(folder / "bank", base), override(Run(), ["merge.policy=laplace"])
    mta.Personalizer(base, bank, folder / "people").personalize(OTHERS[2:3])
    with pytest.raises(ConfigError, match="policy 'laplace' needs a calibrated bank"):
        mta.Personalizer(base, bank, run=run).personalize(OTHERS[:2])
    personal = mta.Personalizer(base, calibrated(folder, base), folder / "people", run=run)
    with pytest.raises(OtherBank):
        personal.state(OTHERS[2].id)
    personal.personalize(OTHERS[:2])
    state = personal.state(OTHERS[0].id)
    assert state.shots == len(OTHERS[0].items)
    assert len(state.gradient) == len(state.w) == len(personal.bank)


def test_people_behind_a_calibration_are_remembered(copy):
    parts = [copy.info.members.parts_of(person.id) for person in OTHERS]
    assert parts.count(["calibration"]) == 8
    used = OTHERS[parts.index(["calibration"])].id
    assert mark_stale(copy.folder, used) == ["calibration"]


# -- interrupted, forgotten, unknown -----------------------------------------------------------------------------------


def test_a_copy_follows_its_bank_in_forgetting(folder, base):
    (folder / "bank" / "needs-rebuild.json").write_text(json.dumps({"needs_rebuild": ["anchor", "calibration"]}))
    calibrated(folder, base)
    assert parts_to_rebuild(folder / "copy") == ["anchor"]


def test_a_copy_replaces_no_other_bank(folder, base, copy):
    with pytest.raises(BankError, match="exists already"):
        calibrated(folder, base)
    assert read_info(folder / "copy").hash == copy.hash


def test_too_few_people_are_refused(folder, base):
    with pytest.raises(InputError, match=r"all except 3 are in the bank, .* 8 are needed"):
        calibrated(folder, base, people_of(3, prefix="few-"))
    assert not (folder / "copy").exists()


def test_items_of_another_task_are_named(folder, base):
    others = [Person(f"o{n}", (Item({"text": "Fine. " * 20, "rating": "3"}),) * 3) for n in range(9)]
    with pytest.raises(DataError, match="item 1 of 'o0'"):
        calibrated(folder, base, others)


def test_an_item_that_is_too_long_is_named_before_anything_is_measured(folder):
    narrow = base_of()
    narrow.prompts.max_tokens = 20  # less than the instruction
    with pytest.raises(DataError, match=r"^item 1 of 'other-\d+': task .* max_tokens is 20"):
        calibrated(folder, narrow)


def test_another_calibration_is_without_that_of_a_forgotten_person(folder, base, copy):
    used = next(p.id for p in OTHERS if copy.info.members.parts_of(p.id))
    forget_person(used, None, copy.folder)
    assert parts_to_rebuild(copy.folder) == ["calibration"]
    for name, people in {"again": OTHERS, "without": [one for one in OTHERS if one.id != used]}.items():
        again = copy.calibrate(base, people, folder / name, run=RUN)  # the file may still hold the person
        twice = again.calibrate(base, OTHERS, folder / f"{name}-twice", run=RUN)
        for found in (again, twice):
            assert parts_to_rebuild(found.folder) == []
            assert found.info.members.parts_of(used) == []


def test_who_is_forgotten_during_a_calibration_stays_marked(folder, base, copy, monkeypatch):
    used, plain = next(p.id for p in OTHERS if copy.info.members.parts_of(p.id)), add_calibration.calibrate
    monkeypatch.setattr(
        add_calibration, "calibrate", lambda *of, **how: mark_stale(copy.folder, used) and plain(*of, **how)
    )
    assert parts_to_rebuild(copy.calibrate(base, OTHERS, folder / "again", run=RUN).folder) == ["calibration"]


def test_a_candidate_who_is_forgotten_during_the_first_calibration_is_marked(folder, base, monkeypatch):
    bank = mta.Bank.open(folder / "bank", base)
    noted = iter([set()])
    late = {bank.info.members.hash_of(OTHERS[0].id)}  # as of a candidate, whose other parts are marked already
    monkeypatch.setattr(add_calibration, "forgotten_in", lambda _: next(noted, late))
    assert parts_to_rebuild(bank.calibrate(base, OTHERS, folder / "new", run=RUN).folder) == ["calibration"]


def test_a_bank_without_members_is_not_calibrated_but_keeps_its_limit(folder, base):
    (folder / "bank" / "members.json").unlink()
    with pytest.raises(InputError, match=r"has no members\.json, so its members are unknown"):
        calibrated(folder, base)
    task = mta.Bank.open(folder / "bank", base).task.model_copy(update={"answer_tokens": 7})
    format.write_task(folder / "bank", task)
    assert read_info(folder / "bank").task.answer_tokens == 7


HEADLINES = load_task("lamp4")


def article(number):
    return Item(
        {"text": f"A long report about the event number {number} of this year, " * 3, "title": f"Event {number}"}
    )


def test_members_of_the_bank_and_shared_items_are_left_out_but_not_the_people_who_hold_them():
    people = [Person(f"p{n}", tuple(article(10 * n + k) for k in range(4))) for n in range(6)]
    chain = [replace(one, items=(*one.items, article(10 * n + 10)), group="p0") for n, one in enumerate(people)]
    found = {
        one.id: one.items
        for one in calibration_people(chain, {"p0"}, RUN.calibration, seed=0, task=HEADLINES, unseen={})
    }
    assert found.keys() == {"p1", "p2", "p3", "p4", "p5"}
    for person in people[1:5]:
        assert found[person.id] == person.items[1:]  # the first belongs to the one before, the last to the next
    assert found["p5"] == (*people[5].items[1:], article(60))


def test_people_who_hold_most_items_of_a_member_are_left_out():
    people = [Person(f"p{n}", tuple(article(20 * n + k) for k in range(12))) for n in range(3)]
    twin = Person("twin", (*people[0].items, article(99), article(98)))
    found = calibration_people([*people, twin], {"p0"}, RUN.calibration, seed=0, task=HEADLINES, unseen={})
    assert {one.id for one in found} == {"p1", "p2"}


def test_only_items_that_the_task_lora_did_not_see_are_measured():
    people = [Person(f"p{n}", tuple(article(10 * n + k) for k in range(6))) for n in range(3)]
    shared = replace(people[1], items=(people[2].items[4], *people[1].items[1:]))
    seen = calibration_people([people[0], shared, people[2]], set(), RUN.calibration, 0, HEADLINES, {"p1": 4, "p2": 3})
    found = {one.id: one.items for one in seen}
    assert found == {"p0": people[0].items, "p1": people[1].items[1:4], "p2": people[2].items[:3]}


def test_twins_of_people_who_train_the_task_lora_are_not_measured():
    people = [Person(f"p{n}", tuple(article(20 * n + k) for k in range(12))) for n in range(3)]
    twin = Person("twin", (*people[0].items[2:], article(99), article(98)))
    unseen = {"p0": 4, "p1": 4, "twin": 4}
    found = calibration_people([*people, twin], set(), RUN.calibration, 0, HEADLINES, unseen)
    assert {one.id for one in found} == {"p1", "p2"}
