"""``mta demo`` on real weights, cut down to two minutes: every file is there, and a second call changes nothing."""

import json

import pytest

from mta.cli import main

SMALL = [
    "people.task=8",
    "people.development=4",
    "people.test=5",
    "run.task_lora.items=32",
    "run.bank.anchors=3",
    "run.bank.max_items=6",
    "run.bank.training.epochs=1",
    "evaluation.shots=4",
    "evaluation.queries=3",
    "evaluation.oppu.training.steps=1",
    'evaluation.policies=["uniform", "posterior", "ridge", "learned"]',
]


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.network
def test_the_demo_tells_everything_and_repeats_itself(tmp_path, fetched, monkeypatch, capsys):
    for asset in ("smollm2-135m-instruct", "all-minilm-l6-v2", "movielens-100k"):
        fetched(asset)
    monkeypatch.setattr("sys.argv", ["mta", "demo", "--out", str(tmp_path), "--json", *SMALL])
    told = []
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code in (0, None)
        told.append(json.loads(capsys.readouterr().out))
    rows = {row["name"]: row for row in told[0]["methods"]}
    assert {"global constant", "own constant", "base", "task LoRA", "OPPU", "adapt only", "MTA"} <= rows.keys()
    assert {"merge only, ridge", "merge only, learned"} <= rows.keys()
    assert rows["MTA"]["bytes_per_person"] < rows["OPPU"]["bytes_per_person"] / 4
    assert told[0]["meta"]["note"] == "dequantized from Q4_1"
    report = (tmp_path / "report.html").read_text()
    assert "GroupLens" in report
    for name, row in rows.items():
        other = next(r for r in told[1]["methods"] if r["name"] == name)
        assert row["metrics"] == other["metrics"], name
