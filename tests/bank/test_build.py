"""Build a bank: equal inputs give equal banks, also after kills."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import kill
import pytest
import torch
from builds import CANDIDATES, TASK_PEOPLE, UNCALIBRATED, build, changed, files_in, stopped, trained
from conftest import TINY_RUN, HashEncoder, memory_for, people_of, stopped_when
from filelock import FileLock
from safetensors.torch import load_file
from tiny import base_of

from mta.bank.bank import Bank
from mta.bank.format import read_info
from mta.data.history import Item
from mta.errors import BankError, DataError, InputError
from mta.tracking.run_folder import sittings
from mta.training.checkpoint import Checkpoint
from mta.training.trainer import Job


def without_seconds(folder: Path) -> dict:
    values = json.loads((folder / "bank.json").read_text())
    del values["seconds"], values["sha256"]
    return values


# -- the same work, the same bank --------------------------------------------------------------------------------------


def test_a_bank_holds_these_files_and_no_others(built):
    assert sorted(files_in(built)) == [
        ".lock",
        "README.md",
        "anchors.safetensors",
        "bank.json",
        "calibration.safetensors",
        "config.yaml",
        "index.safetensors",
        "members.json",
        "metrics.jsonl",
        "run.json",
        "task_lora/adapter_config.json",
        "task_lora/adapter_model.safetensors",
    ]
    assert not list(built.glob("work"))


def test_the_order_of_people_and_the_command_do_not_change_a_bank(built, tmp_path):
    mixed = [random.Random(1).sample(people, len(people)) for people in (TASK_PEOPLE, CANDIDATES)]
    again = build(tmp_path / "bank", *mixed, command="mta bank build")
    assert len(trained(again)) == 5
    assert trained(again) == trained(built)
    assert without_seconds(again) == without_seconds(built)
    assert read_info(again).hash == read_info(built).hash
    ((asked,), (plain,)) = sittings(again), sittings(built)
    assert (asked["command"], plain["command"]) == ("mta bank build", "")
    assert asked["work"] == plain["work"]
    assert asked["plan"] == read_info(built).plan
    assert asked["outcome"] == {"anchors": 3, "items": 12, "items left out": 6, "texts shortened": 0}


def test_a_build_goes_on_with_other_memory(built, tmp_path):
    """The hint of a build that found no memory asks for less."""
    stopped(tmp_path / "bank", run=UNCALIBRATED)
    stages = []
    other = UNCALIBRATED.model_copy(update={"memory": "3GiB"})
    out = build(tmp_path / "bank", run=other, on_step=lambda stage, step: stages.append(stage))
    assert "task LoRA" not in stages
    assert trained(out)["task_lora/adapter_model.safetensors"] == trained(built)["task_lora/adapter_model.safetensors"]


def test_anchors_trained_in_several_cohorts_are_the_same(tmp_path, task):
    base, run = base_of(), changed("task_lora", UNCALIBRATED, enabled=False)
    jobs = [
        Job(person.id, [base.prompts.example(task, item) for item in person.latest(4).items]) for person in CANDIDATES
    ]
    numbers = 2 * sum(d + o for d, o in base.targets.values())
    expected = load_file(build(tmp_path / "one", run=run) / "anchors.safetensors")
    for cohort, count in ((1, 3), (2, 2)):
        less, steps = run.model_copy(update={"memory": memory_for(base, jobs, numbers, cohort)}), []
        again = build(tmp_path / f"{cohort}", run=less, on_step=lambda *step, steps=steps: steps.append(step))
        steps = [step.people for stage, step in steps if stage == "anchors"]
        assert (max(steps), len(steps)) == (cohort, count * 4)
        for name, tensor in load_file(again / "anchors.safetensors").items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-10)


# -- once --------------------------------------------------------------------------------------------------------------


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_finished_build_is_left_as_it_is(built):
    before, steps = stamps(built), []
    build(built, on_step=lambda *_: steps.append(1))
    assert stamps(built) == before
    assert steps == []


@pytest.mark.parametrize(
    "other",
    [
        {"candidates": CANDIDATES[:-1]},
        {"task_people": TASK_PEOPLE[:-1]},
        {"candidates": [CANDIDATES[0].first(5), *CANDIDATES[1:]]},
        {"run": changed("bank", anchors=2)},
        {"run": TINY_RUN.model_copy(update={"seed": 1})},
    ],
    ids=["candidates", "task people", "an item less", "settings", "seed"],
)
def test_another_bank_in_the_folder_is_not_overwritten(built, other):
    before = stamps(built)
    with pytest.raises(BankError) as caught:
        build(built, **other)
    assert str(caught.value) == (
        f"{built} holds a bank built from other people, another base, or other settings (dtype, …)\n"
        "  Choose another folder with --out: the states of people need this bank."
    )
    assert stamps(built) == before


@pytest.mark.slow
def test_a_build_killed_again_and_again_ends_with_the_same_bank(built, tmp_path, cache):
    folders = [tmp_path / name for name in ("whole", "one", "two", "three")]
    kills = kill.until_done(build, folders)
    assert all(kills)
    for folder in folders:
        assert trained(folder) == trained(built)
        assert without_seconds(folder) == without_seconds(built)
        assert sorted(files_in(folder)) == sorted(files_in(built))  # no half-written file is left
        assert len(Bank.open(folder, base_of())) == 3
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            assert json.loads(line)["stage"] in ("task LoRA", "anchors", "calibration")


def test_a_build_resumed_where_encodings_differ_keeps_nothing_of_other_anchors(tmp_path):
    """As on a GPU, whose rounding may lead to other clusters. Of 40 candidates, the same 8 calibrate both banks."""
    people = people_of(40, prefix="somebody-c")

    def made(name, **how):
        return build(tmp_path / name, candidates=people, **how)

    def anchors(folder):
        members = read_info(folder).members
        return [person.id for person in people if "anchor" in members.parts_of(person.id)]

    class Turned(HashEncoder):
        def encode(self, texts):
            return super().encode([text[::-1] for text in texts])

    fresh = made("fresh", encoder=Turned())
    stopped(tmp_path / "bank", "calibration", 2, candidates=people)
    resumed = made("bank", encoder=Turned())
    assert anchors(fresh) != anchors(made("other", run=changed("task_lora", UNCALIBRATED, enabled=False)))
    assert trained(resumed) == trained(fresh)


def test_an_interrupted_build_is_not_overwritten_by_one_with_other_settings(built, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "due", lambda _: True)
    stopped(tmp_path / "bank", at=3, run=TINY_RUN.model_copy(update={"seed": 1}))
    before = stamps(tmp_path / "bank")
    with pytest.raises(BankError, match="holds an interrupted build from other people, another base, or"):
        build(tmp_path / "bank")
    assert stamps(tmp_path / "bank") == before
    shutil.rmtree(tmp_path / "bank" / "work")
    out = build(tmp_path / "bank", run=UNCALIBRATED)
    assert (out / "anchors.safetensors").read_bytes() == (built / "anchors.safetensors").read_bytes()


def test_a_build_in_the_folder_of_another_process_is_refused_and_changes_nothing(tmp_path):
    stopped(tmp_path / "bank")
    before = stamps(tmp_path / "bank")
    with FileLock(tmp_path / "bank" / ".lock"), pytest.raises(InputError, match="another process is writing to"):
        build(tmp_path / "bank")
    assert stamps(tmp_path / "bank") == before


def test_an_item_that_is_too_long_is_named_before_anything_is_trained(tmp_path):
    first, *others = TASK_PEOPLE
    long = tuple(Item({**item.fields, "genres": "Drama, " * 1000}) for item in first.items)
    with pytest.raises(DataError, match=rf"^item \d of '{first.id}': .* instruction and target take"):
        build(tmp_path / "bank", task_people=[replace(first, items=long), *others])
    assert not (tmp_path / "bank").exists()


def test_a_calibration_that_is_given_up_costs_no_training(built, tmp_path):
    seen = []

    with stopped_when(lambda stage, step: seen.append(stage) or stage == "calibration") as stop:
        build(tmp_path / "bank", on_step=stop)
    seen.clear()
    out = build(tmp_path / "bank", run=changed("calibration", enabled=False), on_step=stop)
    assert seen == []
    assert (out / "anchors.safetensors").read_bytes() == (built / "anchors.safetensors").read_bytes()
    assert not read_info(out).run.calibration.enabled


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BankError, match=r"holds thesis.txt, which does not belong to a bank\n  Choose an empty"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
