"""Files of results: what is missing, which record counts, and what is published."""

import gzip
import json
from types import SimpleNamespace

import pytest
import yaml
from pages import ROOT

from mta.config import override
from mta.data.tasks import load_task
from mta.errors import DataError
from mta.system.atomic import write_json
from mta_lab.experiments.recipe import load_experiment
from mta_lab.experiments.results import (
    CURRENT,
    RECIPE,
    Record,
    Records,
    latest,
    read_beside,
    read_records,
    write_without_texts,
)
from mta_lab.experiments.workspace import Workspace
from mta_lab.reports.report import lamp_answers


def record(person="p", key="k", texts=None, **metrics):
    where = {"key": key, "settings": "s", "method": "m", "bank": "main", "seed": 0, "shots": 8, "person": person}
    return Record(**where | (texts or {}), metrics=metrics or {"MAE": 1.0}, nll=None, seconds=0, bytes=0)


def test_records_find_missing_results(tmp_path):
    records = Records(tmp_path)
    records.add([record("p"), record("q")])
    records.add([record("p")])
    again = Records(tmp_path)
    assert len(again.rows) == 2
    assert not again.lacks("k", ["p", "q"])
    assert again.lacks("k", ["p", "r"])
    assert again.lacks("other", ["p"])


def test_a_result_with_texts_serves_exhibits_without_them_and_counts_before_them(tmp_path):
    only, full = record(NLL=2.0), record(NLL=2.0, **{"ROUGE-L": 0.5})
    records = Records(tmp_path)
    records.add([only])
    assert not records.lacks("k", ["p"])
    assert records.lacks("k", ["p"], full=True)
    records.add([full])
    assert not records.lacks("k", ["p"], full=True)
    records.add([only])
    assert Records(tmp_path).rows == [only, full]
    assert latest([only, full]) == latest([full, only]) == [full]


def test_published_records_are_those_of_the_last_bank_in_every_order(tmp_path):
    records = [record(key="z"), record("q", key="z"), record(key="a")]
    write_without_texts(records, tmp_path / "scores.jsonl.gz")
    assert read_records(tmp_path) == [records[2]] == latest(read_records(tmp_path))


def test_a_line_that_was_cut_within_a_character_is_computed_again(tmp_path):
    whole, cut = record(), record(texts={"answers": ("Č",)}).model_dump_json().encode()
    (tmp_path / "scores.jsonl").write_bytes(cut[: cut.index(b"\xc4") + 1] + b"\n" + whole.model_dump_json().encode())
    assert read_records(tmp_path) == [whole]


@pytest.mark.parametrize("name", ["scores.jsonl", "scores.jsonl.gz"])
def test_damaged_scores_are_an_error(tmp_path, name):
    packed = gzip.compress(record().model_dump_json().encode())
    for content in (packed[:-9], packed[:12] + b"\xff\xff" + packed[14:]) if name.endswith("gz") else (b"\xff\xfe\n",):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="damaged or not readable"):
            read_records(tmp_path)
    (tmp_path / "sizes.json").write_text("null")
    with pytest.raises(DataError, match="not readable JSON"):
        read_beside(tmp_path / "sizes.json")


def test_answers_of_methods_with_one_name_are_in_different_files_and_those_not_written_in_none(tmp_path):
    one, other, unwritten = (
        record(texts={"settings": kind, "ids": ("q",), "answers": (text,), "golds": ("gold",)}, **metrics)
        for kind, text, metrics in (("a", "one", {"ROUGE-L": 1}), ("b", "two", {"ROUGE-L": 1}), ("c", "", {"NLL": 1}))
    )
    lamp_answers([one, other, unwritten], load_task("lamp4"), tmp_path)
    found = {path.stem: json.loads(path.read_text())["golds"][0]["output"] for path in tmp_path.iterdir()}
    assert found == {"m-main-8-0": "one", "m-main-8-0-2": "two", "golds-8": "gold"}


def test_every_file_of_answers_can_be_scored_also_where_methods_answered_for_different_people(tmp_path):
    rows = [
        record(
            person, texts={"method": name, "ids": (person,), "answers": ("a",), "golds": (person,)}, **{"ROUGE-L": 1}
        )
        for name, people in (("all", "pqr"), ("few", "pq"))
        for person in people
    ]
    lamp_answers(rows, load_task("lamp4"), tmp_path)
    ids = {p.stem: {one["id"] for one in json.loads(p.read_text())["golds"]} for p in tmp_path.iterdir()}
    assert ids.pop("golds-8") == ids.pop("all-main-8-0") == {"p", "q", "r"}
    assert ids == {"few-main-8-0": {"p", "q"}, "few-main-8-0-golds": {"p", "q"}}


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("scores.jsonl.gz")), ids=lambda path: path.parent.name)
def test_published_scores_have_one_key_for_each_method_and_seed(path):
    keys = {}
    for row in read_records(path.parent):
        keys.setdefault((row.settings, row.bank, row.shots, row.seed), set()).add(row.key)
    assert [where for where, found in keys.items() if len(found) > 1] == []


def folder_of(recipe, out, which="test"):
    """What ``Workspace.write_recipe`` needs."""
    folder = out if which == "test" else out / which
    folder.mkdir(parents=True, exist_ok=True)
    more = {"protocol": lambda *_: "p", "histories": "h", "learned_from": recipe.run.encoder}
    return SimpleNamespace(recipe=recipe, out=out, folder=folder, sizes={}, **more)


def test_a_run_on_development_people_leaves_the_recipe_of_the_test(tmp_path):
    recipe = load_experiment("smoke")
    Workspace.write_recipe(folder_of(recipe, tmp_path))
    Workspace.write_recipe(folder_of(override(recipe, ["shots=1"]), tmp_path, "development"))
    found = {path: yaml.safe_load((tmp_path / path / RECIPE).read_text())["shots"] for path in ("", "development")}
    assert found == {"": recipe.shots, "development": 1}


def test_results_of_banks_that_were_trained_otherwise_do_not_count(tmp_path):
    recipe, banks = load_experiment("smoke"), {"main-0": "a", "main-1": "b"}
    Workspace.write_recipe(folder_of(recipe, tmp_path))
    write_json(tmp_path / CURRENT, read_beside(tmp_path / CURRENT) | {"banks": banks})
    Workspace.write_recipe(folder_of(override(recipe, ["run.merge.policy=uniform"]), tmp_path))
    assert read_beside(tmp_path / CURRENT)["banks"] == banks
    for word in ("run.bank.training.lr=0.5", "run.encoder=other"):
        Workspace.write_recipe(folder_of(recipe, tmp_path))
        write_json(tmp_path / CURRENT, read_beside(tmp_path / CURRENT) | {"banks": banks})
        Workspace.write_recipe(folder_of(override(recipe, [word]), tmp_path))
        assert read_beside(tmp_path / CURRENT)["banks"] == {"main-0": "", "main-1": ""}


def test_results_of_a_part_whose_bank_was_trained_otherwise_do_not_count(tmp_path):
    recipe, banks = load_experiment("smoke"), {"main-0": "a", "no-task-lora-0": "b"}
    (part,) = (part for part in recipe.exhibits["ablation"] if part.bank == "no-task-lora")
    others = tuple(one for one in recipe.exhibits["ablation"] if one is not part)
    for words, left in ((part.words, banks), ((*part.words, "bank.training.lr=0.5"), banks | {"no-task-lora-0": ""})):
        changed = {"ablation": (*others, part.model_copy(update={"words": words}))}
        Workspace.write_recipe(folder_of(recipe.model_copy(update={"exhibits": changed}), tmp_path))
        if words == part.words:
            write_json(tmp_path / CURRENT, read_beside(tmp_path / CURRENT) | {"banks": banks})
        assert read_beside(tmp_path / CURRENT)["banks"] == left
