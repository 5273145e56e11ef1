"""Personalize again: up-to-date people are skipped, and an interrupted run equals an uninterrupted one."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import kill
import pytest
from conftest import people_of, personalizer, stopped_when
from crowd import PEOPLE, QUESTION, in_cohorts_of, knowing, same, states_in
from files import folder_of
from tiny import base_of

from mta.bank.bank import Bank
from mta.config import MergeSettings
from mta.data.history import Item, Person
from mta.data.tasks.prompt import PromptFormat
from mta.errors import AnchorNotFound, ConfigError, InputError, StoreError
from mta.personalize.outcomes import Personalized
from mta.store import Session, Store
from mta.store.run_checkpoints import RunCheckpoints
from mta.system.storage import Storage
from mta.training.checkpoint import Checkpoint


def test_a_second_call_trains_no_one(known, tmp_path):
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "people").rglob("*")}
    steps = []
    assert known.personalize(PEOPLE, on_step=lambda *_: steps.append(1)) == Personalized(0, 5, 0)
    assert steps == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "people").rglob("*")} == stamps


def test_only_new_people_are_trained(known):
    seen = []
    newcomer = people_of(1, prefix="new")
    done = known.personalize([*PEOPLE, *newcomer], on_step=lambda stage, step: seen.append(step.people))
    assert (done, set(seen)) == (Personalized(1, 5, 0), {1})
    assert [known.store.versions(person.id) for person in PEOPLE] == [[1]] * 5


def test_changed_shots_make_a_new_version(known):
    before = known.state("x0")
    more = Person.of("x0", [*PEOPLE[0].items, Item({**QUESTION, "rating": "1"}, time=99.0)])
    assert known.personalize([more, *PEOPLE[1:]]) == Personalized(1, 4, 0)
    assert known.store.versions("x0") == [1, 2]
    assert known.store.load("x0", 1) == before
    assert known.state("x0").history == more.digest() != before.history


def test_a_damaged_state_is_trained_again(known, tmp_path):
    before = known.state("x0")
    (path,) = (tmp_path / "people").glob(f"*/{folder_of(known.store, 'x0')}/1.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert known.personalize(PEOPLE) == Personalized(1, 4, 0)
    same(known.state("x0"), before)


def test_texts_that_were_cut_are_counted(tiny):
    long = Person.of("long", [Item({"title": "word " * 100, "genres": "Drama", "rating": "4"})])
    assert personalizer(*tiny).personalize([long, PEOPLE[0]]).shortened == 1


def personalize_in(folder: Path, bank: str, policy: str) -> None:
    """Personalize five people in cohorts of two, in a store with a fixed key; the test kills this process."""
    (folder / "people").mkdir(parents=True, exist_ok=True)
    (folder / "people" / "store.json").write_text(json.dumps({"schema": 1, "key": "ab" * 32}))
    base = base_of()
    merge = MergeSettings(policy=policy, k=0)
    personal = in_cohorts_of(base, Bank.open(bank, base), 2, store=folder / "people", merge=merge)
    personal.personalize(PEOPLE)


@pytest.mark.parametrize(
    "times", [pytest.param(1, marks=pytest.mark.integration), pytest.param(3, marks=pytest.mark.slow)]
)
def test_killed_again_and_again_the_store_ends_the_same(by_policy, tmp_path, times):
    _, bank, merge = by_policy
    folders = [tmp_path / name for name in ("whole", "one", "two", "three")[: times + 1]]
    kills = kill.until_done(personalize_in, folders, bank.folder, merge.policy)
    assert all(kills)
    expected = states_in(tmp_path / "whole" / "people")
    assert len(expected) == 5
    for folder in folders:
        assert states_in(folder / "people") == expected
        assert not (folder / "people" / "work").exists()


def test_a_run_goes_on_from_its_checkpoint(by_policy, tmp_path, monkeypatch):
    *tiny, merge = by_policy
    whole, seen = knowing(*tiny, tmp_path / "whole", merge=merge), []
    personal = personalizer(*tiny, store=tmp_path / "people", merge=merge)
    monkeypatch.setattr(Checkpoint, "due", lambda _: True)

    def first(stage, step):
        seen.append((stage, step.step))
        return seen[-1] == ("stack", 2) and seen.count(("stack", 2)) == 1

    with stopped_when(first) as stop:
        personal.personalize(PEOPLE, on_step=stop)
    seen.append("again")
    personal.personalize(PEOPLE, on_step=stop)
    again = seen[seen.index("again") + 1 :]
    assert [step for stage, step in again if stage == "stack"] == [2]
    assert all(personal.state(person.id) == whole.state(person.id) for person in PEOPLE)


def test_states_and_histories_are_written_to_a_bucket_several_at_once(tiny, tmp_path, monkeypatch):
    write, both = Storage.write, {name: Barrier(2) for name in ("history.json", "1.safetensors")}

    def waiting(files, name, *data, **how):
        if barrier := both.get(name.rpartition("/")[2]):
            barrier.wait(60)  # for another one
        write(files, name, *data, **how)

    monkeypatch.setattr(Storage, "write", waiting)
    url = f"memory://{tmp_path.name}/people"
    done = personalizer(*tiny, store=url).personalize(PEOPLE[:4], histories=PEOPLE[:4])
    assert done.trained == 4
    assert all(Store(url).history(person.id) == person for person in PEOPLE[:4])


@pytest.mark.parametrize("saved", [0, 3])
def test_a_run_stopped_before_all_states_are_saved_does_not_train_again(tiny, tmp_path, monkeypatch, saved):
    whole, room, save, store = knowing(*tiny, tmp_path / "whole"), [saved], Session.save, tmp_path / "people"

    def full(*given, **how):
        if not room[0]:
            raise OSError("No space left on device")
        room[0] -= 1
        return save(*given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", full)
        with pytest.raises(OSError, match="No space left"):
            personalizer(*tiny, store=store).personalize(PEOPLE)
    personal, seen = personalizer(*tiny, store=store), []
    personal.personalize(PEOPLE, on_step=lambda stage, step: seen.append(stage))
    assert seen.count("stack") == 0
    assert all(personal.state(person.id) == whole.state(person.id) for person in PEOPLE)
    assert not (store / "work").exists()


def test_a_run_of_other_people_keeps_the_checkpoint_of_a_stopped_run(tiny, tmp_path):
    personal = personalizer(*tiny, store=tmp_path)
    with stopped_when(lambda stage, step: stage == "stack") as stop:
        personal.personalize(PEOPLE, on_step=stop)
    (begun,) = (tmp_path / "work").iterdir()
    personal.personalize(people_of(1, prefix="other"))
    assert list((tmp_path / "work").iterdir()) == [begun]
    assert (begun / "plan.json").is_file()
    personal.forget("x0")
    assert not (tmp_path / "work").exists()


def test_a_resumed_plan_covers_everybody(tiny, tmp_path):
    changed = [*PEOPLE[1:], PEOPLE[0].first(2)]
    knowing(*tiny, tmp_path)
    with stopped_when(lambda stage, step: True) as stop:
        personalizer(*tiny, store=tmp_path).personalize(changed, on_step=stop)  # a plan of one person
    personalizer(*tiny, store=tmp_path, merge=MergeSettings(policy="uniform")).personalize(changed)
    again = personalizer(*tiny, store=tmp_path)
    assert again.personalize(changed).trained == len(PEOPLE)
    assert {again.state(person.id).policy for person in PEOPLE} == {"posterior"}


def test_an_update_of_new_people_that_is_stopped_goes_on_with_its_plan(tiny, tmp_path):
    personal = in_cohorts_of(*tiny, 2, store=tmp_path / "people")
    personal.personalize([PEOPLE[0].first(2)])
    begun = len(list((tmp_path / "people").glob("*/*/*.safetensors")))

    def saved(stage, step):
        return len(list((tmp_path / "people").glob("*/*/*.safetensors"))) >= begun + 2  # a cohort

    with stopped_when(saved) as stop:
        personal.update(PEOPLE, on_step=stop)
    (plan,) = (tmp_path / "people" / "work").glob("*/plan.json")
    planned, resumed = json.loads(plan.read_text()), []
    note = RunCheckpoints.note
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunCheckpoints, "note", lambda self, names: (resumed.append(names), note(self, names)))
        personal.update(PEOPLE)
    assert resumed == [planned]
    assert not (tmp_path / "people" / "work").exists()
    personal.store.files.write("work/damaged/plan.json", b"[[1]]")
    assert RunCheckpoints(personal.store.files, "work/damaged").plan() is None


def test_an_item_that_does_not_fit_is_named_by_its_number(known, tiny):
    (person,) = people_of(1, items=3, prefix="long-")
    wrong = Item({**person.items[0].fields, "rating": "no label"}, time=9.0)
    personal = personalizer(*tiny)
    done = personal.personalize([replace(person, items=(*person.items, wrong))])
    assert "item 4: field 'rating'" in str(done.failed[person.id])
    personal.personalize([person])
    done = personal.update([replace(person, items=(*person.items, wrong))])
    assert "item 4: field 'rating'" in str(done.failed[person.id])


def test_a_store_that_is_damaged_is_an_error_before_anything_is_trained(known, tiny, tmp_path):
    (tmp_path / "people" / "store.json").write_text("{}")
    again = personalizer(*tiny, store=tmp_path / "people")
    with pytest.raises(StoreError, match=r"store\.json is damaged or missing"):
        again.personalize(PEOPLE, on_step=lambda *_: pytest.fail("something ran"))


@pytest.mark.parametrize(
    ("merge", "error"), [({"policy": "uniform", "k": 9}, AnchorNotFound), ({"policy": "ridge"}, ConfigError)]
)
def test_impossible_settings_are_refused_before_training(tiny, merge, error):
    base, bank = tiny
    text = bank.task.model_copy(update={"labels": None, "metric": "rouge"})
    personal = personalizer(base, dataclasses.replace(bank, task=text), merge=MergeSettings(**merge))
    with pytest.raises(error, match=r"merge\.k is 9, but the bank has|policy 'ridge' needs a task with labels"):
        personal.personalize(PEOPLE, on_step=lambda *_: pytest.fail("something ran"))


def test_histories_are_kept_only_when_asked_for(tiny, known):
    assert known.store.history("x0") is None
    known.personalize(PEOPLE, histories=PEOPLE)
    assert known.store.history("x0") == PEOPLE[0]
    known.forget("x0")
    assert known.store.history("x0") is None
    with pytest.raises(InputError, match="histories are kept in a store, and there is none"):
        personalizer(*tiny).personalize(PEOPLE, histories=PEOPLE)


def test_a_shortened_question_is_reported(known, caplog):
    known.generate([("x0", {"title": "long " * 400, "genres": "Drama"})], max_new_tokens=2)
    known.shares([("x0", {"title": "long " * 400, "genres": "Drama"}), ("x0", {"title": "short", "genres": "Drama"})])
    cut = "questions were too long: the end of their text was cut off"
    assert caplog.messages == [f"1 of 1 {cut}", f"1 of 2 {cut}"]


@pytest.mark.parametrize(("policy", "most"), [("posterior", 1), ("ridge", 5)])
def test_all_labels_are_only_scored_for_policies_that_read_them(tiny, monkeypatch, policy, most):
    examples, targets = PromptFormat.examples, []
    monkeypatch.setattr(PromptFormat, "examples", lambda *given: (targets.append(len(given[-1])), examples(*given))[1])
    personalizer(*tiny, merge=MergeSettings(policy=policy)).personalize(PEOPLE[:1])
    assert max(targets) == most
