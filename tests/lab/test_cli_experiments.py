"""``mta-lab evaluate`` on a recipe, and ``mta-lab report``: on a small world."""

import json

import pytest
from files import shared_data
from world import closed, mta, run
from world import world as world  # the fixture

pytestmark = pytest.mark.integration

TINY = ["run.encoder=base", "run.dtype=float32", "run.memory=64MiB", "run.max_tokens=400", "run.bank.training.epochs=1"]
FEW = ["people.test=3", "people.development=2", "people.candidates=8", "people.task=6", "few=2", "seeds=[0]"]


@pytest.fixture(scope="module")
def smoke(world):
    """The ablation of the smoke recipe, on the world's members."""
    words = [f"run.base={world.base}", "run.task=movielens-rating", *TINY]
    out = world.root / "runs"
    return ["evaluate", "smoke", *words, "--data", world.members, "--out", out, "--exhibit", "ablation"], out


def test_a_recipe_runs_and_says_what_to_type_next(smoke):
    command, out = smoke
    said = mta(*command)
    assert f"mta-lab report {out}" in said.err
    assert "ablation, seed 0, 3 shots: MTA" in said.err
    assert mta(*command, "--json").json["sizes"]["test"] == 4
    assert "MTA" not in mta(*command).err  # it is finished
    closed(out)


def test_a_report_is_drawn_without_a_model(smoke, tmp_path, monkeypatch):
    command, out = smoke
    mta(*command)
    monkeypatch.setattr("mta.model.base.BaseModel.load", None)
    drawn = mta("report", out, "--out", tmp_path / "report", "--json").json["drawn"]
    assert drawn == ["members.jsonl: Ablation", "members.jsonl: What the banks' cards expect"]
    closed(tmp_path / "report")
    assert "| no task LoRA |" in (tmp_path / "report" / "members.jsonl" / "README.md").read_text()


def test_a_report_is_drawn_again_from_itself_also_in_place_of_an_older_one(smoke, tmp_path):
    command, out = smoke
    mta(*command)
    drawn, again = (tmp_path / name / "members.jsonl" for name in ("drawn", "again"))
    drawn.mkdir(parents=True)
    older = {"machine": "another", "threads": 1, "versions": {}, "hours": 1, "command": "older", "commit": "older"}
    (drawn / "meta.json").write_text(json.dumps({"exhibits": ["banks"], "runs": [older]}))
    (drawn / "banks.json").write_text('{"older": {}}')
    mta("report", out, "--out", drawn.parent)
    mta("report", drawn, "--out", again.parent)
    assert "older" not in (drawn / "banks.json").read_text()
    assert {file.name: file.read_bytes() for file in drawn.glob("*.*")} == {
        file.name: file.read_bytes() for file in again.glob("*.*")
    }


def test_bad_rows_and_names_of_columns_are_as_for_other_commands(tmp_path):
    table, bad = tmp_path / "reviews.csv", tmp_path / "bad.jsonl"
    table.write_text("who,text,score\nann,Fine.,4\nann,Bad.,9\n")
    words = ["evaluate", "lamp3", "--data", table, "--out", tmp_path / "out"]
    assert run(*words).err.rstrip().endswith("or name its column:  --columns person=NAME")
    words += ["--columns", "person=who"]
    assert "--skip-bad FILE" in run(*words).err
    assert "1 bad rows" in run(*words, "--skip-bad", bad).err  # and too few people
    assert json.loads(bad.read_text())["row"]["score"] == "9"
    assert "--test names another" in run(*words, "--skip-bad", bad, "--test", table).err
    lamp = tmp_path / "dev_questions.json"
    lamp.write_text(json.dumps([{"id": "1", "input": "x", "profile": [{"id": "2", "text": "Fine.", "score": "4"}]}]))
    table.write_text("who,text,score\nann,Fine.,4\n")
    both = ["evaluate", "lamp3", "--data", lamp, "--test", table, "--columns", "person=who", "--out", tmp_path / "both"]
    assert "column" not in run(*both).err  # the names are those of the tested people's file
    said = run(*words, "--columns", "time=day")
    assert said.err.rstrip().endswith("Name a column of the file:  --columns time=NAME")


def test_exhibits_for_development_people_do_not_run_on_test_people(smoke):
    command, _ = smoke
    said = run(*command[:-1], "tune")
    assert said.code == 1
    assert "--on development" in said.err


@pytest.mark.parametrize("name", ["lamp3_amazon", "lamp4_huffpost", "lamp5_papers"])
def test_lamp_files_run_by_their_recipe(world, tmp_path, name):
    """Real data through the whole pipeline, on a tiny base. Checks that it runs, not the scores."""
    recipe, out = name.split("_")[0], tmp_path / "runs"
    small = ["run.task_lora.items=8", "run.bank.max_items=4", "queries=2", "run.max_tokens=300"]
    words = [f"run.base={world.base}", *TINY, *FEW, *small]
    mta("evaluate", recipe, *words, "--data", shared_data(name), "--out", out, "--exhibit", "ablation")
    mta("report", out, "--out", tmp_path / "report", "--texts")
    folder = tmp_path / "report" / name
    assert "| MTA |" in (folder / "README.md").read_text()
    assert list((folder / "answers").glob("mta-main-8-0.json"))
