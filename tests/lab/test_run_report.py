"""The report of a run's folder: outcome, methods, losses, and errors for folders without a run."""

import json

import pytest
from conftest import TINY_RUN
from tiny import base_of

from mta.errors import DataError
from mta.system.atomic import write_json
from mta.system.progress import Step
from mta.tracking.run_folder import RunFolder, sittings
from mta_lab.reports.report import history, report, run_sections


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


def sections(folder):
    return {one.title: one for one in run_sections(folder)}


def test_outcome_and_losses_are_tables(tmp_path):
    losses = [1.0] * 18 + [0.5, 0.7]
    outcome = {"people": 4, "NLL": {"MTA": 1.25, "base": 2.0}, "failed": 0}
    found = sections(made(tmp_path / "one", losses=losses, outcome=outcome))
    assert found["Outcome"].text.splitlines()[2:] == [
        "| people | 4 |",
        "| NLL | MTA 1.25, base 2.0 |",
        "| failed | 0 |",
    ]
    assert "| anchors | 0.600 | 20 |" in found["Losses"].text
    assert list(found["Losses"].pictures) == ["losses"]


@pytest.mark.parametrize(
    ("sitting", "text"),
    [
        ({"hours": None, "ended": None}, "stopped before its end"),
        ({"hours": 0.01, "stopped": "KeyboardInterrupt"}, "0.01 hours, then stopped"),
        ({"hours": 0.01}, "0.01 hours on"),
    ],
)
def test_the_history_shows_how_each_session_ended(tmp_path, sitting, text):
    folder = made(tmp_path / "one")
    written = json.loads((folder / "run.json").read_text())
    written["sittings"][0].update(sitting)
    write_json(folder / "run.json", written)
    assert history(sittings(folder)).startswith(f"- mta bank one: {text}")


def test_methods_of_a_comparison_are_a_table_and_a_forest_plot(tmp_path):
    rows = [method("task LoRA", 1.5), method("MTA", 1.25, -0.25), method("OPPU", 9.0, 7.5)]
    section = sections(made(tmp_path / "one", "comparison", results=rows))["Methods"]
    assert "| MTA | 1.250 [1.150, 1.350] |" in section.text
    assert section.pictures["methods"].alt.endswith("left is better): MTA -0.250, OPPU +7.500.")


def test_the_report_writes_markdown_and_a_page(tmp_path):
    drawn = report([made(tmp_path / "one"), made(tmp_path / "two")], tmp_path / "out")
    assert drawn == ["one: Outcome", "one: Losses", "two: Outcome", "two: Losses"]
    text = (tmp_path / "out" / "one" / "README.md").read_text()
    assert text.startswith("# one: bank\n\n- mta bank one: ")
    assert "![Losses](losses.svg)" in text
    assert "anchors, 1.000 at the end" in (tmp_path / "out" / "one" / "losses.svg").read_text()
    assert (tmp_path / "out" / "one" / "losses.png").stat().st_size > 1000
    assert '<img src="data:image/svg+xml;base64,' in (tmp_path / "out" / "two" / "index.html").read_text()


def test_two_folders_of_one_name_are_refused(tmp_path):
    folders = [made(tmp_path / "a" / "bank"), made(tmp_path / "b" / "bank")]
    with pytest.raises(DataError, match="two folders would have the report"):
        report(folders, tmp_path / "out")
    report([folders[0], folders[0]], tmp_path / "out")  # the same folder


def test_a_folder_without_a_run_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(DataError) as caught:
        report([made(tmp_path / "one"), tmp_path / "two"], tmp_path / "out")
    assert str(caught.value).startswith(
        f"{tmp_path}/two is not a run's folder: it contains no run.json\n  Give the --out of"
    )
    assert not (tmp_path / "out").exists()


def test_results_that_are_not_readable_are_refused(tmp_path):
    folder = made(tmp_path / "one", "comparison")
    (folder / "results.json").write_text('{"methods": [{"name": "MTA"}]}')
    with pytest.raises(DataError, match=r"results.json contains no results of a comparison: .*\n  Repeat"):
        report([folder], tmp_path / "out")
