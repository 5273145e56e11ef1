"""Calibrating a bank that an older version built: what changes, what does not, and what an interruption costs."""

import contextlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builds import build, changed
from conftest import people_of
from filelock import FileLock

import mta
from mta.bank import add_calibration, format
from mta.bank.calibration.people import calibration_people
from mta.bank.calibration.probes import CalibrationWorker
from mta.bank.format import read_info, verify
from mta.bank.notes import mark_stale, stale, stops
from mta.config import CalibrationSettings, Run, load_settings, override
from mta.data.history import Item, Person
from mta.data.tasks import PromptFormat, load_task
from mta.distributed.executor import LocalExecutor
from mta.errors import BankCorrupt, BankError, ConfigError, DataError, InputError, OtherBank
from mta.personalize import forget_person
from mta.training.checkpoint import Checkpoint

WRITTEN = Path(__file__).parents[1] / "fixtures" / "release_0_1"
RUN = Run(calibration=CalibrationSettings(people=8, shots=3, queries=2, steps=1))
OTHERS = people_of(9, prefix="other-")


@pytest.fixture
def folder(tmp_path, cache):
    return Path(shutil.copytree(WRITTEN, tmp_path / "written"))


@pytest.fixture
def base(folder):
    return mta.BaseModel.load(str(folder / "model"), dtype="float64", max_tokens=400)


def calibrated(folder, base, people=OTHERS, **how) -> mta.Bank:
    return mta.Bank.open(folder / "bank", base).calibrate(base, people, run=RUN, **how)


def test_an_older_bank_is_calibrated_in_place(folder, base):
    before = mta.Bank.open(folder / "bank", base)
    assert before.calibration is None
    after = calibrated(folder, base)
    verify(folder / "bank", after.info, full=True)
    assert after.hash != before.hash
    assert after.calibration.info == after.info.calibration
    assert after.calibration.info.people == 8
    assert (before.info.run.merge.policy, after.info.run.merge.policy) == ("posterior", "auto")
    assert {name: after.info.files[name] for name in before.info.files} == before.info.files
    assert not (folder / "bank" / "work").exists()
    assert "What to expect" in (folder / "bank" / "README.md").read_text()


def test_settings_that_were_chosen_for_a_bank_stay(tiny, tmp_path):
    base, bank = tiny
    after = bank.calibrate(base, OTHERS, run=bank.info.run, out=tmp_path / "copy")
    assert bank.info.run.merge.policy == "posterior"  # today's default is another
    assert (after.info.run.merge, after.info.run.stack) == (bank.info.run.merge, bank.info.run.stack)


def test_the_settings_beside_a_bank_are_those_of_its_calibration(tiny, tmp_path):
    base, bank = tiny
    after = bank.calibrate(base, OTHERS, run=RUN, out=tmp_path / "copy")
    written = load_settings(Run, after.folder / "config.yaml")
    assert written.calibration == after.info.run.calibration == RUN.calibration
    assert (written.merge, written.stack, written.seed) == (
        after.info.run.merge,
        after.info.run.stack,
        bank.info.run.seed,
    )


def test_a_calibration_says_first_how_long_it_will_take(folder, base, caplog):
    said = []
    with caplog.at_level("INFO", "mta"):
        calibrated(folder, base, on_step=lambda stage, step: said or said.append(caplog.text))
    assert re.search(r"calibration: 8 people, about [\d.]+ s in one process here", said[0])


def test_people_are_personalized_by_one_gradient_after_a_calibration(folder, base, monkeypatch):
    for name, found in (("prior_of", 8.0), ("best_on_average", 2)):  # random people may not differ
        monkeypatch.setattr(f"mta.bank.calibration.crossfit.{name}", lambda *_, found=found: found)
    run = override(Run(), ["merge.policy=laplace"])
    with pytest.raises(ConfigError, match="policy 'laplace' needs a calibrated bank"):
        mta.Personalizer(base, mta.Bank.open(folder / "bank", base), run=run).personalize(OTHERS[:2])
    personal = mta.Personalizer(base, calibrated(folder, base), folder / "people", run=run)
    known = json.loads((WRITTEN / "expected.json").read_text())["people"]
    with pytest.raises(OtherBank):
        personal.state(min(known))
    personal.personalize(OTHERS[:2])
    state = personal.state(OTHERS[0].id)
    assert state.shots == len(OTHERS[0].items)
    assert len(state.gradient) == len(state.w) == len(personal.bank)


def test_an_interrupted_calibration_resumes_and_gives_the_same(folder, base, tmp_path, monkeypatch):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    whole = calibrated(other, base)
    done, scores = [], CalibrationWorker.scores

    def stops(measure, piece):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(piece.name)
        return scores(measure, piece)

    with monkeypatch.context() as patched:
        patched.setattr(CalibrationWorker, "scores", stops)
        with pytest.raises(KeyboardInterrupt):
            calibrated(folder, base)
    assert read_info(folder / "bank").calibration is None
    again = []
    monkeypatch.setattr(
        CalibrationWorker, "scores", lambda measure, piece: (again.append(piece.name), scores(measure, piece))[1]
    )
    assert calibrated(folder, base).hash == whole.hash
    assert done
    assert not set(done) & set(again)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_results_for_other_coefficients_are_not_taken_over(folder, base, tmp_path, monkeypatch):
    whole = calibrated(Path(shutil.copytree(folder, tmp_path / "other")), base)
    with monkeypatch.context() as patched:  # an older version, which tried other lengths
        patched.setattr("mta.bank.calibration.crossfit.LENGTHS", (0.1, 0.2))
        patched.setattr(CalibrationWorker, "stacks", interrupt)
        with pytest.raises(KeyboardInterrupt):
            calibrated(folder, base)
    assert list((folder / "bank" / "work").glob("scores-*"))
    assert calibrated(folder, base).hash == whole.hash


def test_people_behind_a_calibration_are_remembered(folder, base):
    bank = calibrated(folder, base)
    parts = [bank.info.members.parts_of(person.id) for person in OTHERS]
    assert parts.count(["calibration"]) == 8
    used = OTHERS[parts.index(["calibration"])].id
    assert mark_stale(folder / "bank", used) == ["calibration"]


def test_calibrating_twice_replaces_the_first(folder, base):
    first = calibrated(folder, base)
    second = calibrated(folder, base, people_of(10, prefix="more-"))
    assert second.hash != first.hash
    assert [part for person in OTHERS for part in second.info.members.parts_of(person.id)] == []


# -- interrupted, forgotten, unknown -----------------------------------------------------------------------------------


@pytest.mark.parametrize("calibrated_before", [False, True])
@pytest.mark.parametrize("write", range(1, 6))
def test_a_bank_that_is_killed_between_two_writes_opens_and_can_be_calibrated_again(
    folder, base, monkeypatch, calibrated_before, write
):
    if calibrated_before:
        calibrated(folder, base, people_of(10, prefix="more-"))
    calls = []

    def counted(name):
        original = getattr(add_calibration, name)

        def one(path, *rest):
            if str(path).endswith(("calibrating", "build-in-progress")):
                return original(path, *rest)
            calls.append(name)
            if len(calls) == write:
                raise KeyboardInterrupt
            return original(path, *rest)

        return one

    with monkeypatch.context() as patched:
        for name in ("write_tensors", "write_text", "write_info", "clear_stale", "remove_work"):
            patched.setattr(add_calibration, name, counted(name))
        with contextlib.suppress(KeyboardInterrupt):
            calibrated(folder, base)
    bank = mta.Bank.open(folder / "bank", base, full=True)
    assert bank.calibration is None or bank.calibration.info == bank.info.calibration
    assert bank.info.members.hashed
    assert calibrated(folder, base).info.calibration.people == 8


def test_members_are_known_after_two_kills(folder, base, monkeypatch):
    bank = folder / "bank"

    def killed(*_, **__):
        raise KeyboardInterrupt

    for stop, at in (("first", (Path, "replace")), ("second", (format, "write_json"))):
        info = read_info(bank)
        with monkeypatch.context() as patched:
            patched.setattr(*at, killed)
            with pytest.raises(KeyboardInterrupt):
                format.write_info(bank, info.model_copy(update={"members": info.members.calibrated_on([stop])}))
    found = read_info(bank).members
    assert found.hashed is not None
    assert (found.parts_of("first"), found.parts_of("second")) == (["calibration"], [])


def test_a_bank_whose_writer_was_killed_before_its_members_were_in_place_can_be_copied(folder, base, monkeypatch):
    bank, info = folder / "bank", read_info(folder / "bank")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            format.write_info(bank, info.model_copy(update={"members": info.members.calibrated_on(["somebody"])}))
    calibrated(folder, base, out=folder / "copy")
    assert read_info(folder / "copy").members.parts_of(OTHERS[0].id) == ["calibration"]


def test_a_calibration_measures_no_more_people_together_than_the_executor_takes(folder, base, monkeypatch):
    sizes, scores = [], CalibrationWorker.scores
    monkeypatch.setattr(
        CalibrationWorker, "scores", lambda own, piece: (sizes.append(len(piece.examples)), scores(own, piece))[1]
    )
    calibrated(folder, base, executor=LocalExecutor(most=2))
    assert set(sizes) == {2}


def test_two_calibrations_of_one_bank_do_not_wait_for_each_other(folder, base):
    lock = FileLock(folder / "bank" / ".lock")
    with lock, pytest.raises(InputError, match="another process is writing to"):
        calibrated(folder, base)
    assert calibrated(folder, base).calibration


def test_members_are_known_whenever_the_description_is_written(folder, base, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    for stop, at in (("before", (format, "write_json")), ("after", (Path, "replace"))):
        info = read_info(folder / "bank")
        info = info.model_copy(update={"members": info.members.calibrated_on([stop])})
        with monkeypatch.context() as patched:
            patched.setattr(*at, killed)
            with pytest.raises(Killed):
                format.write_info(folder / "bank", info)
        found = read_info(folder / "bank").members
        assert found.hashed is not None
        assert bool(found.parts_of(stop)) == (stop == "after")


def test_a_person_forgotten_during_a_calibration_is_not_in_it(folder, base):
    def forget(stage, step):
        forget_person(OTHERS[0].id, None, folder / "bank")

    with pytest.raises(BankError, match="a person was forgotten during the calibration"):
        calibrated(folder, base, on_step=forget)
    assert read_info(folder / "bank").calibration is None
    assert not (folder / "bank" / "work").exists()


def test_a_calibration_killed_after_a_person_was_forgotten_leaves_nothing_of_them(folder, base, monkeypatch):
    """What is saved after `forget` has removed all is removed at once, although the kill leaves no time to look."""
    saved, save = list[Path](), Checkpoint.save

    def forget_before_the_second(self, *given):
        saved.append(self.path)
        if len(saved) == 2:
            forget_person(OTHERS[0].id, None, folder / "bank")
        save(self, *given)

    def killed(*_):
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", forget_before_the_second)
    monkeypatch.setattr(add_calibration, "_check_not_stopped", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrated(folder, base)
    assert not list((folder / "bank").glob("work/*"))


def test_a_person_forgotten_while_a_calibration_is_written_is_not_in_it(folder, base, monkeypatch):
    write_info = add_calibration.write_info

    def forget_first(path, info):
        if info.calibration:
            forget_person(OTHERS[0].id, None, folder / "bank")
        write_info(path, info)

    monkeypatch.setattr(add_calibration, "write_info", forget_first)
    with pytest.raises(BankError, match="a person was forgotten during the calibration"):
        calibrated(folder, base)
    bank = mta.Bank.open(folder / "bank", base, full=True)
    assert bank.calibration is None
    assert bank.info.members.parts_of(OTHERS[0].id) == []
    assert not (folder / "bank" / "work").exists()
    assert "What to expect" not in (folder / "bank" / "README.md").read_text()


def test_a_calibration_that_is_given_up_at_its_end_leaves_nothing_of_anybody(folder, base, monkeypatch):
    calibrated(folder, base)
    more, write = people_of(9, prefix="more-"), add_calibration.write_info

    def forget_then(path, info):
        write(path, info)
        if info.calibration:
            forget_person(next(one.id for one in more if info.members.parts_of(one.id)), None, folder / "bank")

    monkeypatch.setattr(add_calibration, "write_info", forget_then)
    with pytest.raises(BankError, match="a person was forgotten"):
        calibrated(folder, base, more)
    assert read_info(folder / "bank").calibration is None
    assert stale(folder / "bank") == []  # nothing of anybody is left in a calibration


def test_too_few_people_leave_a_calibrated_bank_as_it_is(folder, base):
    before = calibrated(folder, base)
    with pytest.raises(InputError, match=r"all except 3 are in the bank, .* 8 are needed"):
        calibrated(folder, base, people_of(3, prefix="few-"))
    after = mta.Bank.open(folder / "bank", base, full=True)
    assert (after.hash, after.calibration.info) == (before.hash, before.calibration.info)
    assert not (folder / "bank" / "work").exists()


def test_a_person_forgotten_after_people_were_read_is_in_no_calibration_of_them(folder, base):
    since = stops(folder / "bank")
    forget_person(OTHERS[0].id, None, folder / "bank")
    with pytest.raises(BankError, match="a person was forgotten during the calibration"):
        calibrated(folder, base, since=since)
    assert mta.Bank.open(folder / "bank", base).calibration is None
    assert not (folder / "bank" / "work").exists()
    calibrated(folder, base, OTHERS[1:])


def test_a_copy_resumes_and_follows_its_bank_in_forgetting(folder, base, tmp_path, monkeypatch):
    out, bank = tmp_path / "copy", folder / "bank"
    whole = calibrated(Path(shutil.copytree(folder, tmp_path / "other")), base)
    with monkeypatch.context() as patched:
        patched.setattr(CalibrationWorker, "scores", interrupt)
        with pytest.raises(KeyboardInterrupt):
            calibrated(folder, base, out=out)
    assert calibrated(folder, base, out=out).hash == whole.hash
    assert read_info(bank).calibration is None

    with monkeypatch.context() as patched:
        patched.setattr(
            CalibrationWorker, "scores", lambda *_: forget_person(OTHERS[0].id, None, bank) and torch.zeros(8)
        )
        with pytest.raises(BankError, match="a person was forgotten during the calibration"):
            calibrated(folder, base, out=tmp_path / "another")
    (bank / "needs-rebuild.json").write_text(json.dumps({"needs_rebuild": ["anchor"]}))
    calibrated(folder, base, OTHERS[1:], out=tmp_path / "another")
    assert stale(tmp_path / "another") == ["anchor"]


def test_an_original_is_not_taken_for_an_unfinished_copy(folder, base, tmp_path):
    copy = calibrated(folder, base, out=tmp_path / "copy")
    before = read_info(folder / "bank").hash
    with pytest.raises(BankError, match="is a bank already"):
        copy.calibrate(base, OTHERS, run=RUN, out=folder / "bank")
    assert read_info(folder / "bank").hash == before


def test_a_bank_that_cannot_be_written_is_calibrated_in_a_copy(folder, base, tmp_path, monkeypatch):
    locked, before = [], {file: file.read_bytes() for file in (folder / "bank").rglob("*") if file.is_file()}
    monkeypatch.setattr(add_calibration, "exclusive", lambda at: locked.append(at) or contextlib.nullcontext())
    assert calibrated(folder, base, out=tmp_path / "copy").info.calibration
    assert locked == [tmp_path / "copy"]
    assert before == {file: file.read_bytes() for file in (folder / "bank").rglob("*") if file.is_file()}


def test_a_bank_of_others_names_no_file_to_copy(folder, base, tmp_path):
    bank, info = folder / "bank", read_info(folder / "bank")
    (bank / "notes").write_text("mine")
    files = info.files | {"notes": format.file_hashes(bank, ["notes"])["notes"]}
    format.write_info(bank, format.with_hash(info.model_copy(update={"files": files})))
    with pytest.raises(BankCorrupt, match="notes"):
        calibrated(folder, base, out=tmp_path / "copy")
    assert not list(tmp_path.rglob("copy*"))


def test_nothing_is_copied_where_nothing_can_be_calibrated(folder, base, tmp_path):
    with pytest.raises(InputError, match="1 people are given"):
        calibrated(folder, base, OTHERS[:1], out=tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_forgetting_removes_what_an_interrupted_calibration_measured(folder, base):
    def stop(stage, step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(folder, base, on_step=stop)
    assert list((folder / "bank" / "work").glob("gradients-*"))
    forget_person(OTHERS[0].id, None, folder / "bank")
    assert not (folder / "bank" / "work").exists()


def test_forgetting_removes_what_a_killed_calibration_or_forgetting_left(folder, base):
    left = folder / "bank" / "work" / "gradients-0.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"measured")
    forget_person(OTHERS[0].id, None, folder / "bank")
    assert not left.parent.exists()


def test_an_item_that_is_too_long_is_named_before_anything_is_measured(folder):
    narrow = mta.BaseModel.load(str(folder / "model"), dtype="float64", max_tokens=20)  # less than the instruction
    with pytest.raises(DataError, match=r"^item 1 of 'other-\d+': task .* max_tokens is 20"):
        calibrated(folder, narrow)
    assert not (folder / "bank" / "work").exists()


def test_only_items_that_are_measured_have_to_fit(folder, base, monkeypatch):
    late, checked = Item({"title": "Late", "genres": "Drama", "rating": "3"}, time=1e9), []
    monkeypatch.setattr(PromptFormat, "check", lambda self, task, items: checked.extend(items))
    calibrated(folder, base, [replace(person, items=(*person.items, *[late] * 60)) for person in OTHERS])
    assert len(checked) >= 2 * len(OTHERS)
    assert len([item for _, item in checked if item is late]) < 30 * len(OTHERS)


def test_another_calibration_replaces_that_of_a_forgotten_person(folder, base):
    bank = calibrated(folder, base)
    used = next(p.id for p in OTHERS if bank.info.members.parts_of(p.id))
    forget_person(used, None, folder / "bank")
    assert stale(folder / "bank") == ["calibration"]
    calibrated(folder, base, [person for person in OTHERS if person.id != used])
    assert stale(folder / "bank") == []


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


def test_settings_that_cannot_be_read_cost_no_calibration(tiny, tmp_path, monkeypatch):
    base, bank = tiny
    first = bank.calibrate(base, OTHERS, run=RUN, out=tmp_path / "copy")
    (first.folder / "config.yaml").write_text("a: [")
    monkeypatch.setattr(add_calibration, "_measured", lambda *_: pytest.fail("measured"))
    with pytest.raises(ConfigError, match="not readable YAML"):
        first.calibrate(base, OTHERS[:8], run=RUN)
    assert mta.Bank.open(first.folder, base).calibration.info == first.calibration.info


def test_a_calibration_that_is_dropped_has_no_members(tiny, tmp_path, monkeypatch):
    base, bank = tiny
    first = bank.calibrate(base, OTHERS, run=RUN, out=tmp_path / "copy")
    behind = [one.id for one in OTHERS if "calibration" in first.info.members.parts_of(one.id)]
    assert behind

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(add_calibration, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        first.calibrate(base, people_of(9, prefix="more-"), run=RUN)
    left = read_info(first.folder)
    assert left.calibration is None
    assert not [id for id in behind if left.members.parts_of(id)]


def test_a_calibration_with_the_banks_own_settings_is_not_measured_again(folder, base, monkeypatch):
    """Those that the bank had before, which were switched off, and those that it has since."""
    first = mta.Bank.open(folder / "bank", base).calibrate(base, OTHERS)
    monkeypatch.setattr(add_calibration, "_measured", lambda *_: pytest.fail("measured"))
    base.name = "/at/another/place"
    assert mta.Bank.open(folder / "bank", base).calibrate(base, OTHERS).hash == first.hash


def test_settings_of_a_calibration_stay_where_there_is_none(tmp_path):
    run = changed("calibration", enabled=False, shots=5)
    assert read_info(build(tmp_path / "bank", run=run)).run.calibration == run.calibration
    again = json.loads((tmp_path / "bank" / "bank.json").read_text())
    assert "calibration" not in again


def test_a_finished_calibration_is_not_measured_again(folder, base, tmp_path, monkeypatch):
    """On another machine it would be rounded otherwise, and everybody would have to be personalized again."""
    for out in (None, tmp_path / "copy"):
        first = calibrated(folder, base, out=out)
        before = {path: path.read_bytes() for path in first.folder.iterdir() if path.is_file()}
        with monkeypatch.context() as patched:
            patched.setattr(add_calibration, "_measured", lambda *_: pytest.fail("measured"))
            assert calibrated(folder, base, out=out).hash == first.hash
        assert {path: path.read_bytes() for path in first.folder.iterdir() if path.is_file()} == before
