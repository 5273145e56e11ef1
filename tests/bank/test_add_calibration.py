"""Calibrating a finished bank: what changes, what does not, and that a forgotten person is not in it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from builds import build, changed, files_in
from conftest import people_of
from filelock import FileLock
from tiny import base_of

import mta
from mta.bank import add_calibration, format
from mta.bank.calibration.people import calibration_people
from mta.bank.format import read_info, verify
from mta.bank.notes import forget_marker, mark_stale, note_published, parts_to_rebuild, published, remove_leftovers
from mta.config import CalibrationSettings, Run, override
from mta.data.history import Item, Person
from mta.data.tasks import load_task
from mta.errors import BankError, ConfigError, DataError, InputError, OtherBank
from mta.personalize import forget_person

RUN = Run(calibration=CalibrationSettings(people=8, shots=3, queries=2, steps=1))
OTHERS = people_of(9, prefix="other-")


@pytest.fixture(scope="module")
def uncalibrated(tmp_path_factory):
    return build(tmp_path_factory.mktemp("uncalibrated") / "bank", run=changed("calibration", enabled=False))


@pytest.fixture
def folder(uncalibrated, tmp_path, cache):
    shutil.copytree(uncalibrated, tmp_path / "written" / "bank")
    return tmp_path / "written"


@pytest.fixture
def base():
    return base_of()


def calibrated(folder, base, people=OTHERS, **how) -> mta.Bank:
    return mta.Bank.open(folder / "bank", base).calibrate(base, people, run=RUN, **how)


def test_a_bank_is_calibrated_in_place(folder, base):
    before = mta.Bank.open(folder / "bank", base)
    (folder / "bank" / "LICENSE").write_text("mine")
    (folder / "bank" / "published.json").write_text(json.dumps({"published": ["https://hub/one"]}))
    after = calibrated(folder, base)
    verify(folder / "bank", after.info, full=True)
    assert (before.calibration, after.hash != before.hash) == (None, True)
    assert after.calibration.info == after.info.calibration
    assert after.calibration.info.people == 8
    assert {name: after.info.files[name] for name in before.info.files} == before.info.files
    assert "What to expect" in (folder / "bank" / "README.md").read_text()
    kept = {"LICENSE", "run.json", "metrics.jsonl", "config.yaml", "published.json"}
    assert kept <= {path.name for path in (folder / "bank").iterdir()}
    assert [path.name for path in folder.iterdir()] == ["bank"]


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


def test_people_behind_a_calibration_are_remembered(folder, base):
    bank = calibrated(folder, base)
    parts = [bank.info.members.parts_of(person.id) for person in OTHERS]
    assert parts.count(["calibration"]) == 8
    used = OTHERS[parts.index(["calibration"])].id
    assert mark_stale(folder / "bank", used) == ["calibration"]


# -- interrupted, forgotten, unknown -----------------------------------------------------------------------------------


def test_two_calibrations_of_one_bank_do_not_wait_for_each_other(folder, base):
    lock = FileLock(folder / "bank" / ".lock")
    with lock, pytest.raises(InputError, match="another process is writing to"):
        calibrated(folder, base)
    assert calibrated(folder, base).calibration


def test_a_person_forgotten_during_a_calibration_is_not_in_it(folder, base):
    def forget(stage, step):
        forget_person(OTHERS[0].id, None, folder / "bank")

    with pytest.raises(BankError, match="a person was forgotten during the calibration"):
        calibrated(folder, base, on_step=forget)
    assert read_info(folder / "bank").calibration is None


@pytest.mark.parametrize("out", [None, "copy"])
@pytest.mark.parametrize("when", ["written", "renamed"])
def test_a_person_forgotten_while_a_calibration_is_written_is_not_in_it(folder, base, monkeypatch, out, when):
    bank, copy = folder / "bank", folder / out if out else None
    before = calibrated(folder, base, people_of(10, prefix="more-")) if when == "renamed" else read_info(bank)
    where, name = (Path, "rename") if when == "renamed" else (add_calibration, "write_described")
    original, forgotten = getattr(where, name), []

    def forget_first(*given):
        if not forgotten:
            forgotten.append(forget_person(OTHERS[0].id, None, bank))
        return original(*given)

    monkeypatch.setattr(where, name, forget_first)
    with pytest.raises(BankError, match="a person was forgotten during the calibration"):
        calibrated(folder, base, out=copy)
    found = mta.Bank.open(bank, base, full=True)
    assert forgotten[0].complete
    assert found.hash == before.hash
    assert found.info.members.parts_of(OTHERS[0].id) == []
    assert parts_to_rebuild(bank) == []
    assert [path.name for path in folder.iterdir()] == ["bank"]


def test_what_is_noted_while_a_calibration_is_written_stays(folder, base, monkeypatch):
    rename = Path.rename

    def publish_first(path, target):
        if path == folder / "bank":
            note_published(path, "https://hub/one")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", publish_first)
    calibrated(folder, base)
    assert published(folder / "bank") == ["https://hub/one"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_calibration_that_cannot_replace_the_bank_leaves_it(folder, base, monkeypatch, renames):
    before, rename, done = files_in(folder / "bank"), Path.rename, []

    def fail(path, target):
        done.append(target)
        if len(done) == renames:
            raise OSError("no space left")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space left"):
        calibrated(folder, base)
    assert files_in(folder / "bank") == before
    assert [path.name for path in folder.iterdir()] == ["bank"]


def test_forgetting_removes_what_a_killed_calibration_left(folder, base):
    left = [folder / f".bank.{'0' * 32}", folder / ".bank.replaced", folder / "bank" / "work"]
    for place in left:
        place.mkdir()
        (place / "calibration.safetensors").write_bytes(b"measured")
    (folder / f".bank-2.{'0' * 32}").mkdir()
    forget_person(OTHERS[0].id, None, folder / "bank")
    assert not any(place.exists() for place in left)
    assert {path.name for path in folder.iterdir()} == {"bank", f".bank-2.{'0' * 32}"}


def test_a_bank_that_a_calibration_renames_is_not_taken_for_a_leftover(folder):
    (folder / "bank").rename(folder / ".bank.replaced")
    assert remove_leftovers(folder / "bank") == []
    assert read_info(folder / ".bank.replaced")


@pytest.mark.parametrize("closed", ["mount", "parent"])
def test_a_bank_that_cannot_be_replaced_is_refused_before_anything_is_measured(folder, base, monkeypatch, closed):
    if closed == "mount":
        monkeypatch.setattr(Path, "is_mount", lambda path: path == folder / "bank")
    else:
        monkeypatch.setattr(add_calibration.os, "access", lambda path, mode: path != folder)
    why = "it is a mount point" if closed == "mount" else "is not writable"
    with pytest.raises(BankError, match=rf"cannot be replaced by the calibrated bank: .*{why}\n  Calibrate a copy:"):
        calibrated(folder, base, on_step=lambda *_: pytest.fail("measured"))


def test_a_copy_follows_its_bank_in_forgetting(folder, base):
    (folder / "bank" / "needs-rebuild.json").write_text(json.dumps({"needs_rebuild": ["anchor", "calibration"]}))
    calibrated(folder, base, out=folder / "copy")
    assert parts_to_rebuild(folder / "copy") == ["anchor"]


def test_a_copy_replaces_no_other_bank(folder, base):
    copy = calibrated(folder, base, out=folder / "copy")
    before = read_info(folder / "bank").hash
    with pytest.raises(BankError, match="exists already"):
        copy.calibrate(base, OTHERS, run=RUN, out=folder / "bank")
    assert read_info(folder / "bank").hash == before


def test_too_few_people_leave_a_calibrated_bank_as_it_is(folder, base):
    before = calibrated(folder, base)
    with pytest.raises(InputError, match=r"all except 3 are in the bank, .* 8 are needed"):
        calibrated(folder, base, people_of(3, prefix="few-"))
    after = mta.Bank.open(folder / "bank", base, full=True)
    assert (after.hash, after.calibration.info) == (before.hash, before.calibration.info)


def test_a_person_forgotten_after_people_were_read_is_in_no_calibration_of_them(folder, base):
    since = forget_marker(folder / "bank")
    forget_person(OTHERS[0].id, None, folder / "bank")
    with pytest.raises(BankError, match="a person was forgotten during the calibration"):
        calibrated(folder, base, since=since)
    assert mta.Bank.open(folder / "bank", base).calibration is None
    calibrated(folder, base, OTHERS[1:])


def test_a_bank_that_cannot_be_written_is_calibrated_in_a_copy(folder, base, tmp_path, monkeypatch):
    before = files_in(folder / "bank")
    monkeypatch.setattr(add_calibration, "exclusive", lambda _: pytest.fail("locked"))
    assert calibrated(folder, base, out=tmp_path / "copy").info.calibration
    assert files_in(folder / "bank") == before


def test_an_item_that_is_too_long_is_named_before_anything_is_measured(folder):
    narrow = base_of()
    narrow.prompts.max_tokens = 20  # less than the instruction
    with pytest.raises(DataError, match=r"^item 1 of 'other-\d+': task .* max_tokens is 20"):
        calibrated(folder, narrow)


def test_another_calibration_replaces_that_of_a_forgotten_person(folder, base):
    bank = calibrated(folder, base)
    used = next(p.id for p in OTHERS if bank.info.members.parts_of(p.id))
    forget_person(used, None, folder / "bank")
    assert parts_to_rebuild(folder / "bank") == ["calibration"]
    calibrated(folder, base, [person for person in OTHERS if person.id != used])
    assert parts_to_rebuild(folder / "bank") == []


def test_a_bank_without_members_is_not_calibrated_but_keeps_its_limit(folder, base):
    (folder / "bank" / "members.json").unlink()
    with pytest.raises(InputError, match=r"has no members\.json, so its members are unknown"):
        calibrated(folder, base)
    task = mta.Bank.open(folder / "bank", base).task.model_copy(update={"answer_tokens": 7})
    format.write_task(folder / "bank", task)
    assert read_info(folder / "bank").task["answer_tokens"] == 7


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
