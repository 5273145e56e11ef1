"""``mta data`` and ``mta-lab score``: what is in a file."""

import json
import re

import pytest
from world import BOB, TASK, mta, run
from world import world as world  # the fixture


def test_data_describe_counts_people_and_items(world):
    found = mta("data", "describe", world.new, *TASK, "--json").json
    assert (found["people"], found["items"], found["queries"]) == (4, 24, 0)
    splits = found["splits"]
    assert splits["people with times"] == 4
    assert splits["anchors"] == {"items": 11, "people": 0}
    assert splits["compared"] == {"shots": 8, "queries": 12, "people": 0}
    assert sum(splits["labels"].values()) == pytest.approx(1, abs=1e-3)
    said = mta("data", "describe", world.new, *TASK).out
    assert said.startswith("people 4  items 24  min 6  median 6")
    assert "with 11 items or more, enough to become anchors of a bank: 0 people" in said
    assert "people with a time on every item: 4" in said
    assert "shared items: none" in said


def test_data_describe_counts_shared_items_and_prints_no_text(tmp_path):
    text = "A review so long that nobody else writes it by coincidence, word for word, about hoxha."
    rows = [{"person": person, "text": text, "score": "4"} for person in ("ann", "bob")]
    path = tmp_path / "data.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in (*rows, {"person": "eve", "text": "Fine.", "score": "5"}))
    )
    said = mta("data", "describe", path, "--task", "lamp3")
    held = "1 items belong to more than one person and connect 2 people in 1 groups of at most 2"
    assert f"shared items: {held}" in said.out
    assert not re.search("hoxha|ann|bob", said.out)
    found = mta("data", "describe", path, "--task", "lamp3", "--json").json["shared"]
    assert found == {"items": 1, "people": 2, "groups": 1, "largest": 2}


def test_data_show_prints_the_prompt_and_marks_the_target_also_in_json(world, monkeypatch):
    with monkeypatch.context() as patched:  # a prompt needs no weights
        patched.setattr("mta.model.base.BaseModel.of", None)
        said = mta("data", "show", world.new, *world.settings, "--person", BOB, "--items", 1).out
    assert said.startswith("<|start|>user\nHow many stars")
    assert '"Zorblax 31" (Drama)' in said
    assert "<|start|>assistant\n⟦2<|end|>⟧\n" in said
    assert re.search(r"-- \d+ tokens, 2 in the target, 0 cut", said)
    shown = mta("data", "show", world.new, *world.settings, "--items", 2, "--json").json
    assert len(shown) == 2
    assert [mask for mask in shown[0]["target_mask"] if mask] == [1, 1]
    assert len(shown[0]["tokens"]) == len(shown[0]["target_mask"])
    behind = mta("data", "show", world.new, *world.settings, "--items", 2, "--json", "task_lora.history=1").json
    assert ["Earlier answers" in one["prompt"] for one in behind] == [False, True]


def test_answers_are_scored_with_the_metrics_of_the_benchmark(tmp_path):
    golds = [{"id": "1", "output": "4"}, {"id": "2", "output": "2"}]
    said = [{"id": "2", "output": "nothing"}, {"id": "1", "output": "3"}]
    paths = [tmp_path / name for name in ("dev_outputs.json", "mine.json")]
    for path, rows in zip(paths, (golds, said)):
        path.write_text(json.dumps({"task": "LaMP_3", "golds": rows}))
    words = ["score", paths[1], "--true", paths[0], "--task", "lamp3"]
    assert mta(*words).out == "MAE 2.0000  RMSE 2.2361  questions 2\n"
    assert mta(*words, "--json").json == {"MAE": 2.0, "RMSE": pytest.approx(5**0.5), "questions": 2}


def test_answers_in_lines_are_no_outputs_of_the_benchmark(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"person": "ann", "answer": "3"}\n')
    said = run("score", path, "--true", path, "--task", "lamp3")
    assert (said.code, 'found no LaMP outputs: {"task": …, "golds": […]}' in said.err) == (1, True), said.err
