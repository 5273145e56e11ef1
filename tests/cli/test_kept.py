"""Run folders of the long verbs: their config.yaml gives the same result again."""

import json
from pathlib import Path

import pytest
from world import mta, run
from world import world as world  # the fixture

pytestmark = pytest.mark.integration


def sitting(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())["sittings"][-1]


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    words = ["shots=2", "queries=2", "policies=[uniform, posterior]", "merge.policy=uniform"]
    return mta("compare", world.new, "--bank", world.bank, *words, "--out", out, "--json").json, out


def test_a_bank_is_a_run_folder_and_its_settings_build_the_same_bank(world, tmp_path):
    entry = sitting(world.bank)
    assert (entry["kind"], entry["seeds"], entry["outcome"]["anchors"]) == ("bank", [0], 2)
    assert entry["command"].startswith("mta bank build ")
    assert len(entry["plan"]) == 64
    before = (world.bank / "run.json").read_bytes()
    words = ["bank", "build", world.members, "--config", world.bank / "config.yaml", "--out"]
    assert world.built.json["hash"][:12] in mta(*words, world.bank).out  # it is finished: nothing is written
    assert (world.bank / "run.json").read_bytes() == before
    assert mta(*words, tmp_path / "again", "--json").json["hash"] == world.built.json["hash"]


def test_a_comparison_is_a_run_folder_and_its_settings_give_the_same_numbers(world, compared, tmp_path):
    found, out = compared
    entry = sitting(out)
    assert (entry["kind"], entry["bank"]) == ("comparison", world.built.json["hash"][:12])
    assert entry["settings"]["shots"] == 2
    assert entry["settings"]["merge"]["policy"] == "uniform"
    assert entry["outcome"]["people"] == 4
    nll = {method["name"]: method["metrics"]["NLL"] for method in found["methods"] if "NLL" in method["metrics"]}
    assert entry["outcome"]["NLL"] == {name: round(one["mean"], 4) for name, one in nll.items()}
    again = mta("compare", world.new, "--bank", world.bank, "--config", out / "config.yaml", "--json").json
    (wrong := out / "wrong.yaml").write_text("merge: {policy: lapace}\n")
    assert "wrong.yaml: merge.policy" in run("compare", world.new, "--bank", world.bank, "--config", wrong).err
    strip = [{name: value for name, value in method.items() if name != "seconds"} for method in found["methods"]]
    assert [{n: v for n, v in method.items() if n != "seconds"} for method in again["methods"]] == strip


def test_personalize_with_run_writes_a_run_folder(world, tmp_path):
    words = ["personalize", world.new, "--bank", world.bank, "--store", tmp_path / "people"]
    mta(*words, "--run", tmp_path / "run")
    entry = sitting(tmp_path / "run")
    assert entry["kind"] == "personalize"
    assert entry["outcome"] == {"trained": 4, "unchanged": 0, "shortened": 0, "failed": 0, "forgotten": 0}
    assert len(entry["plan"]) == 64
    mta(*words, "--run", tmp_path / "run", "--config", tmp_path / "run" / "config.yaml")
    assert sitting(tmp_path / "run")["outcome"]["unchanged"] == 4  # the same settings: the same states
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or not any(word in path.read_bytes() for word in (b"quispe", b"Zorblax")), path


def test_runs_of_every_kind_have_reports(world, compared, tmp_path):
    mta("personalize", world.new, "--bank", world.bank, "--store", tmp_path / "people", "--run", tmp_path / "run")
    said = mta("report", world.bank, compared[1], tmp_path / "run", "--out", tmp_path / "report", "--json").json
    assert {f"{compared[1].name}: Methods", "bank: Losses", "run: Outcome"} <= set(said["drawn"])
    assert "| MTA | " in (tmp_path / "report" / compared[1].name / "README.md").read_text()
    for path in (tmp_path / "report").rglob("README.md"):
        assert not any(word in path.read_text() for word in ("quispe", "hoxha", "Zorblax")), path


def test_a_password_in_a_url_is_not_recorded(monkeypatch):
    from mta.cli.options import command_line

    for given, shown in (
        ("s3://key:secret@host/people", "s3://***@host/people"),
        ("sftp://ann:p@ss@host/people", "sftp://***@host/people"),
        ("https://token@host/people", "https://***@host/people"),
        ("abfs://people@account.dfs.core.windows.net/states", "abfs://people@account.dfs.core.windows.net/states"),
    ):
        monkeypatch.setattr("sys.argv", ["mta", "personalize", "x.jsonl", "--store", given])
        assert command_line() == f"mta personalize x.jsonl --store {shown}"
