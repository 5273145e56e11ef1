"""Files of results: what is missing, which record counts, and what is published."""

import gzip
import json

import pytest
from pages import ROOT

from mta.data.tasks import load_task
from mta.errors import DataError
from mta_lab.experiments.results import Record, Records, Where, latest, read_beside, read_records
from mta_lab.reports.report import lamp_answers

WHERE = Where("k", "m", "main", 8, 0)


def record(person="p", texts=None, **metrics):
    given = WHERE._asdict() | {"person": person} | (texts or {})
    return Record(**given, metrics=metrics or {"MAE": 1.0}, nll=None, seconds=0, bytes=0)


def test_records_find_missing_results(tmp_path):
    records = Records(tmp_path)
    records.add([record("p"), record("q")])
    records.add([record("p")])
    again = Records(tmp_path)
    assert len(again.rows) == 2
    assert not again.lacks(WHERE, ["p", "q"])
    assert again.lacks(WHERE, ["p", "r"])
    assert again.lacks(WHERE._replace(seed=1), ["p"])


def test_a_result_with_texts_serves_exhibits_without_them_and_counts_before_them(tmp_path):
    only, full = record(NLL=2.0), record(NLL=2.0, **{"ROUGE-L": 0.5})
    records = Records(tmp_path)
    records.add([only])
    assert not records.lacks(WHERE, ["p"])
    assert records.lacks(WHERE, ["p"], full=True)
    records.add([full])
    assert not records.lacks(WHERE, ["p"], full=True)
    records.add([only])
    assert Records(tmp_path).rows == [only, full]
    assert latest([only, full]) == latest([full, only]) == [full]


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
        record(texts={"kind": kind, "ids": ("q",), "answers": (text,), "golds": ("gold",)}, **metrics)
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
def test_published_scores_have_one_record_of_a_person_for_each_method_and_seed(path):
    records = read_records(path.parent)
    assert latest(records) == records
