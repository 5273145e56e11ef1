"""``mta demo`` on real weights, cut down to two minutes: every file is there, and a second call changes nothing."""

import json

import pytest
from conftest import people_of
from tiny import save_base

from mta.cli import main
from mta.errors import AnchorNotFound, MemoryBudgetError
from mta.tools import demo as tool

SMALL = [
    "people.task=2370",
    "people.development=4",
    "people.test=5",
    "run.task_lora.items=32",
    "run.task_lora.training.steps=2",
    "run.bank.anchors=3",
    "run.bank.max_items=6",
    "run.bank.training.steps=1",
    "evaluation.shots=4",
    "evaluation.queries=3",
    'evaluation.policies=["uniform", "posterior", "ridge", "learned"]',
]


@pytest.fixture
def assets(fetched):
    """Weights and answers of the demo."""
    for asset in ("smollm2-135m-instruct", "all-minilm-l6-v2", "survey"):
        fetched(asset)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.network
def test_the_demo_shows_two_people_and_repeats_itself(tmp_path, assets, monkeypatch, capsys):
    shown, _ = demo(monkeypatch, capsys, "--out", str(tmp_path))
    for part in ("Person ", "everybody's", "mta serve --bank"):
        assert part in shown
    shown, found = demo(monkeypatch, capsys, "--out", str(tmp_path), "--json")
    _, again = demo(monkeypatch, capsys, "--out", str(tmp_path), "--json")
    rows = [{row["name"]: row for row in one["methods"]} for one in (found, again)]
    known = {"global constant", "own constant", "task LoRA", "label bias", "rank 1 alone", "OPPU", "MTA"}
    assert known <= rows[0].keys()
    assert rows[0]["MTA"]["bytes_per_person"] < 2e6
    assert found["meta"]["note"] == "dequantized from Q4_1"
    assert "SAPA project" in (tmp_path / "report.html").read_text()
    for name, row in rows[0].items():
        assert row["metrics"] == rows[1][name]["metrics"], name


def demo(monkeypatch, capsys, *options):
    """What ``mta demo`` prints for people, and with --json for machines."""
    monkeypatch.setattr("sys.argv", ["mta", "demo", *options, *SMALL])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in (0, None)
    found = capsys.readouterr()
    return (found.err, json.loads(found.out)) if "--json" in options else (found.err + found.out, None)


@pytest.mark.integration
def test_a_mistake_leaves_the_folder_to_the_corrected_command_which_may_show_history(tmp_path):
    """Too little memory is noticed after the splits are drawn, and the hint is to give more."""
    save_base(tmp_path / "base")
    rows = [{"person": p.id, **item.fields, "time": item.time} for p in people_of(40, items=9) for item in p.items]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"run.base": tmp_path / "base", "run.encoder": "base", "data": tmp_path / "people.jsonl"}
    words = [f"{key}={value}" for key, value in names.items()] + ["run.dtype=float32", "run.task=movielens-rating"]
    words += ["people={test: 4, development: 0, task: 8}", "evaluation.shots=3", "evaluation.queries=2"]
    words += ["run.bank.min_items=3", "run.bank.anchors=2"]
    out, recipe = tmp_path / "demo", tool.load_demo("movielens")
    for error, word in ((MemoryBudgetError, "run.memory=100KiB"), (AnchorNotFound, "run.merge.k=9")):
        with pytest.raises(error):
            tool.demo(out, recipe, "", [*words, word])
        assert not (out / "splits.json").exists()
        assert not (out / "recipe.yaml").exists()
        assert not (out / "bank").exists()
    words += ["run.calibration.enabled=false", "run.merge.policy=posterior", "history=[task_lora.history=2]"]
    report = tool.demo(out, recipe, "", words)
    assert report.comparison.names[-2:] == ["history in the prompt", "MTA"]
    asked = [report.comparison.row(name).prompt_tokens for name in report.comparison.names[-2:]]
    assert asked[0] > asked[1]
