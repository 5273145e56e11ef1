"""Every method on every kind of LaMP task."""

import json
from pathlib import Path

import pytest
from tiny import save_base

from mta.data.tasks import load_task
from mta_lab.experiments.recipe import Experiment, load_experiment
from mta_lab.experiments.results import Results, read_records
from mta_lab.experiments.runner import run_experiment
from mta_lab.experiments.workspace import Workspace
from mta_lab.lamp_scores import score
from mta_lab.readers.lamp import read_answers
from mta_lab.reports.report import report

pytestmark = pytest.mark.integration

NEW = {"merge, other person's shots"}  # methods of the controls that the main table does not have


def lamp_files(folder: Path, name: str, people: int = 30, items: int = 8) -> Path:
    """Write invented questions and outputs in the LaMP format."""
    words = {
        "lamp1": (
            'For an author who has written the paper with the title "Study {n}", which reference is related? Just '
            'answer with [1] or [2] without explanation. [1]: "On {n}" [2]: "Of {n}"',
            {"title": "Work {n}", "abstract": "about {n}"},
            "[{odd}]",
        ),
        "lamp2": (
            load_task("lamp2").item.prompt.replace("{description}", "a film about {n}"),
            {"description": "a tale of {n}", "tag": "comedy"},
            "action",
        ),
        "lamp5": (
            "Generate a title for the following abstract of a paper: all of {n}",
            {"title": "Work {n}", "abstract": "about {n}"},
            "Title {n}",
        ),
        "lamp7": (
            "Paraphrase the following tweet without any explanation before or after it: oh {n}",
            {"text": "hello {n}"},
            "ah {n}",
        ),
    }
    question, profile, output = words[name]
    rows, golds = [], []
    for n in range(people):
        fields = [{k: v.format(n=10 * n + i) for k, v in profile.items()} for i in range(items)]
        rows.append(
            {
                "id": f"{n}",
                "input": question.format(n=n),
                "profile": [{"id": f"{n}-{i}", **one} for i, one in enumerate(fields)],
            }
        )
        golds.append({"id": f"{n}", "output": output.format(n=n, odd=1 + n % 2)})
    (folder / "questions.json").write_text(json.dumps(rows))
    (folder / "outputs.json").write_text(json.dumps({"task": load_task(name).lamp, "golds": golds}))
    return folder / "questions.json"


@pytest.mark.parametrize("name", ["lamp1", "lamp2", "lamp5", "lamp7"])
def test_every_method_runs_on_every_kind_of_lamp_task(cache, tmp_path, name):
    """Queries unlike the history, closed and open answers, items without an input."""
    data, base = lamp_files(tmp_path, name), save_base(tmp_path / "base")
    tiny = load_experiment("smoke").model_dump(mode="json", include={"people", "few", "shots", "seeds", "run"})
    recipe = load_experiment(name)
    given = {**recipe.model_dump(mode="json"), **tiny, "queries": 1}
    given["run"] = {**tiny["run"], "task": name, "base": str(base), "dtype": "float32"}
    workspace = Workspace.open(Experiment.model_validate(given), tmp_path / "runs", str(data))
    run_experiment(workspace, ["main"])
    known = read_records(tmp_path / "runs")
    run_experiment(workspace, ["controls"])  # needs only likelihoods
    assert {row.method for row in read_records(tmp_path / "runs")[len(known) :]} <= NEW
    main = Results.read(tmp_path / "runs").comparison("main")
    names_of = {row.name for row in main.rows}
    assert {"MTA", "MTA + RAG", "PAG", "Per-Pcs", "PriME-style", "MTA, chosen"} <= names_of
    assert ("own constant" in names_of) == (name == "lamp2")
    assert all(main.primary in row.people for row in main.rows)
    report([tmp_path / "runs"], tmp_path / "report", texts=True)
    answers = next((tmp_path / "report").rglob("answers"))
    golds = read_answers(answers / "golds-3.json", workspace.task)
    assert golds.keys() < {str(n) for n in range(30)}  # the benchmark's own ids
    for path in answers.glob("*-main-3-0.json"):
        scored = score(workspace.task, read_answers(path, workspace.task, empty=True), golds)
        assert all(0 <= value <= 5 for value in scored.values())
