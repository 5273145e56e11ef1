"""Runs beside each other: what differs and nothing else, curves over each other, and folders that are no run's."""

import json
import re

import pytest
from conftest import TINY_RUN
from tiny import base_of

from mta.errors import DataError
from mta.evaluation.reports.publish import report
from mta.evaluation.reports.runs import compared, read_runs
from mta.system.atomic import write_json
from mta.system.progress import Step
from mta.tracking.run_folder import RunFolder


def made(folder, kind="bank", losses=(3.0, 2.0, 1.5, 1.2, 1.0), outcome=None, run=TINY_RUN, results=None, **about):
    settings = run.model_dump(mode="json")
    how = {"base": base_of(), "settings": settings, "command": f"mta {kind} {folder.name}", "work": "w" * 12}
    with RunFolder(folder=folder, kind=kind, about=about, **how) as kept:
        for n, loss in enumerate(losses, 1):
            kept.step("anchors", Step(n, 2, 2 * n, 2 * len(losses), loss))
        kept.outcome = outcome or {"anchors": 3}
    if results:
        write_json(folder / "results.json", {"people": 4, "primary": "MAE", "methods": results})
    return folder


def method(name, nll, against=None):
    def interval(x):
        return {"mean": x, "low": x - 0.1, "high": x + 0.1}

    differences = {} if against is None else {"task LoRA": {"NLL": interval(against)}}
    return {"name": name, "metrics": {"NLL": interval(nll)}, "differences": differences}


def sections(folders, out):
    return {one.title: one for one in compared(read_runs(folders), out)}


def changed(**update):
    return TINY_RUN.model_copy(update=update)


def test_only_what_differs_is_shown_side_by_side(tmp_path):
    training = TINY_RUN.bank.training.model_copy(update={"lr": 0.5})
    other = changed(seed=7, bank=TINY_RUN.bank.model_copy(update={"training": training}))
    found = sections([made(tmp_path / "one"), made(tmp_path / "two", run=other)], tmp_path)
    text = found["What differs"].text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table == [
        "| setting | one | two |",
        "| --- | --: | --: |",
        "| seed | 0 | 7 |",
        "| bank.training.lr | 0.005 | 0.5 |",
    ]
    assert "base tiny-llama" in text
    assert "version of torch" in text


def test_runs_that_do_not_differ_say_so(tmp_path):
    found = sections([made(tmp_path / "one"), made(tmp_path / "two")], tmp_path)
    assert found["What differs"].text.endswith("\n\nNo setting differs.\n")


def test_a_recipes_settings_are_those_of_other_runs(tmp_path):
    one, two = made(tmp_path / "one"), made(tmp_path / "two", kind="demo", run=changed(seed=3))
    told = json.loads((two / "run.json").read_text())
    told["sittings"][0]["settings"] = {"run": told["sittings"][0]["settings"], "data": "movielens-100k"}
    write_json(two / "run.json", told)
    text = sections([one, two], tmp_path)["What differs"].text
    assert "| seed | 0 | 3 |" in text
    assert "run.seed" not in text


def test_the_table_tells_time_loss_and_outcome(tmp_path):
    losses = [1.0] * 18 + [0.5, 0.7]
    folder = made(
        tmp_path / "one", losses=losses, outcome={"people": 4, "NLL": {"MTA": 1.25, "base": 2.0}, "failed": 0}
    )
    found = sections([folder], tmp_path)
    assert "| anchors | 0.600 (20 steps) |" in found["Loss at the end"].text
    text = found["Runs"].text
    assert re.search(r"\| one \| bank \| 20\d\d-\d\d-\d\d \d\d:\d\d \| \d", text)
    assert "| people 4, lowest NLL: MTA 1.250 |" in text


@pytest.mark.parametrize(
    ("sitting", "told"),
    [
        ({"hours": None, "ended": None}, "died"),
        ({"hours": 0.01, "stopped": "KeyboardInterrupt"}, "stopped after 36 s"),
        ({"hours": 0.01}, "36 s"),
    ],
)
def test_who_died_or_was_stopped_is_told(tmp_path, sitting, told):
    folder = made(tmp_path / "one")
    written = json.loads((folder / "run.json").read_text())
    written["sittings"][0].update(sitting)
    write_json(folder / "run.json", written)
    assert f" | {told} | " in sections([folder], tmp_path)["Runs"].text


def test_the_time_of_all_sittings_counts(tmp_path):
    for _ in range(2):
        folder = made(tmp_path / "one")
    written = json.loads((folder / "run.json").read_text())
    for sitting in written["sittings"]:
        sitting["hours"] = 0.01
    write_json(folder / "run.json", written)
    found = sections([folder], tmp_path)
    assert " | 72 s in 2 sittings | " in found["Runs"].text
    assert found["How they were made"].text == "- one: mta bank one\n"


def test_losses_of_a_stage_are_drawn_over_each_other(tmp_path):
    found = sections([made(tmp_path / "one"), made(tmp_path / "two", losses=[4.0] * 5 + [3.5])], tmp_path)
    assert "| anchors | 1.000 (5 steps) | 3.500 (6 steps) |" in found["Loss at the end"].text
    assert found["Loss: anchors"].pictures == ["loss-0"]
    drawn = (tmp_path / "loss-0.svg").read_text()
    assert "one, 1.000 at the end" in drawn
    assert "two, 3.500 at the end" in drawn
    assert (tmp_path / "loss-0.png").stat().st_size > 1000


def test_a_few_steps_are_a_number_and_no_curve(tmp_path):
    found = sections([made(tmp_path / "one", losses=[2.0, 1.0])], tmp_path)
    assert "| anchors | 1.000 (2 steps) |" in found["Loss at the end"].text
    assert "Loss: anchors" not in found


def test_methods_of_comparisons_stand_side_by_side(tmp_path):
    rows = [method("task LoRA", 1.5), method("MTA", 1.25, -0.25)]
    one = made(tmp_path / "one", "comparison", results=rows)
    two = made(tmp_path / "two", "comparison", results=[*rows, method("OPPU", 9.0, 7.5)])
    section = sections([one, two, made(tmp_path / "bank")], tmp_path)["Methods"]
    assert "| method | one (4 people) | two (4 people) |" in section.text
    assert "| MTA | 1.250 [1.150, 1.350] | 1.250 [1.150, 1.350] |" in section.text
    assert "| OPPU |  | 9.000 [8.900, 9.100] |" in section.text
    drawn = (tmp_path / "methods.svg").read_text()
    assert "NLL against task LoRA" in drawn
    assert "+7.50 \u2192" in drawn  # far out, told in numbers at the edge


def test_an_attacks_results_are_no_comparison(tmp_path):
    folder = made(tmp_path / "one", "privacy")
    write_json(folder / "results.json", {"rows": []})
    assert "Methods" not in sections([folder], tmp_path)


def test_folders_of_one_name_are_told_apart_and_given_twice_shown_once(tmp_path):
    one, two = made(tmp_path / "a" / "bank"), made(tmp_path / "b" / "bank")
    assert [run.name for run in read_runs([one, two, one])] == ["a/bank", "b/bank"]


def test_the_report_writes_markdown_and_a_page(tmp_path):
    drawn = report([made(tmp_path / "one"), made(tmp_path / "two")], tmp_path / "out")
    assert drawn == [
        f"runs: {name}" for name in ("Runs", "What differs", "Loss at the end", "Loss: anchors", "How they were made")
    ]
    assert (tmp_path / "out" / "runs.md").read_text().startswith("# Runs compared\n")
    page = (tmp_path / "out" / "runs.html").read_text()
    assert '<img src="loss-0.svg"' in page
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_folder_that_is_no_runs_is_told_and_nothing_is_written(tmp_path):
    with pytest.raises(DataError) as caught:
        report([made(tmp_path / "one"), tmp_path / "two"], tmp_path / "out")
    assert str(caught.value).startswith(
        f"{tmp_path}/two is no folder of a run: it holds no run.json\n  Give the --out of"
    )
    assert not (tmp_path / "out").exists()


def test_results_that_are_not_readable_are_told(tmp_path):
    folder = made(tmp_path / "one", "comparison")
    (folder / "results.json").write_text('{"methods": [{"name": "MTA"}]}')
    with pytest.raises(DataError, match=r"results.json holds no results of a comparison: .*\n  Make it anew"):
        report([folder], tmp_path / "out")
