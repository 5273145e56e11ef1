"""``mta compare`` and ``mta-lab attack``, from a saved bank and a file of ratings."""

import json

import pytest
from world import mta
from world import world as world  # the fixture


@pytest.fixture(scope="module")
def everybody(world):
    """A file of the people in the bank and of others."""
    path = world.root / "everybody.jsonl"
    path.write_text(world.members.read_text() + world.new.read_text())
    return path


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    words = ["shots=2", "queries=2", "policies=[uniform, auto]", "--people", 2]
    return mta("compare", world.new, "--bank", world.bank, *words, "--out", out, "--json"), out


def test_compare_compares_every_method_on_people_who_are_not_in_the_bank(compared):
    found, out = compared[0].json, compared[1]
    assert (found["people"], found["queries_per_person"]) == (2, 2)
    methods = [method["name"] for method in found["methods"]]
    assert {"base", "task LoRA", "OPPU", "merge only, uniform", "merge only, auto", "MTA"} <= set(methods)
    meta = found["meta"]
    assert (meta["shots"], meta["task"], meta["dtype"]) == (2, "movielens-rating", "float32")
    assert meta["command"].startswith("mta compare ")
    assert "shots=2 queries=2 'policies=[uniform, auto]'" in meta["command"]
    assert json.loads((out / "results.json").read_text())["methods"] == found["methods"]
    page = (out / "report.html").read_text()
    assert "MTA" in page
    assert "quispe" not in page


def test_compare_prints_a_table_and_names_the_seeds(world, tmp_path):
    given = ["shots=2", "queries=1", "brief=true", "seeds=[1,2]", "--people", 2, "--out", tmp_path / "out"]
    said = " ".join(mta("compare", world.new, "--bank", world.bank, *given).out.split())
    assert "2 people, 2 shots and 1 later queries each" in said
    assert "seeds 1, 2" in said
    assert json.loads((tmp_path / "out" / "run.json").read_text())["sittings"][-1]["seeds"] == [1, 2]


def test_attack_attacks_the_bank(world, everybody, tmp_path):
    words = ["attack", everybody, "--bank", world.bank, "shots=2", "targets=2", "items=3"]
    said = mta(*words, "merge.policy=learned", "merge.k=1", "--out", tmp_path / "out", "--json")
    rows = {(row["about"], row["model"]): row for row in said.json["rows"]}
    assert ("the anchors' items", "learned, K = 1") in rows
    own = rows["the anchors' items", "the anchor's own"]
    assert (own["models"], own["members"], own["others"]) == (2, 6, 12)
    assert set(own["attacks"]) == {"loss", "over base", "over task LoRA"}
    assert said.json["meta"]["command"].startswith("mta-lab attack ")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == said.json
    assert (tmp_path / "out" / "privacy.png").stat().st_size > 1000
    (sitting,) = json.loads((tmp_path / "out" / "run.json").read_text())["sittings"]
    assert sitting["kind"] == "privacy"
    assert all(0 <= auc <= 1 for auc in sitting["outcome"]["AUC"].values())
    assert not any(word in said.out for word in ("quispe", "hoxha", "Zorblax"))


def test_attack_prints_a_table(world, everybody):
    said = mta("attack", everybody, "--bank", world.bank, "shots=2", "stack.enabled=no")
    assert "Membership inference by loss" in said.out
    assert "Warning: only 12 items of others" in said.out
