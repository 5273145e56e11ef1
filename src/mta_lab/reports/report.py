"""``mta-lab report``: read result files, and write a folder with tables, pictures, and a page for each."""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mta.data.tasks.task import Task
from mta.errors import DataError
from mta.evaluation.reports.html import Section, page
from mta.evaluation.reports.summary import POOLED, better_side
from mta.evaluation.reports.tables import markdown
from mta.evaluation.statistics import Interval
from mta.system.atomic import copy_file, make_folder, write_json, write_text
from mta.tracking.run_folder import RUN, lines, sittings
from mta_lab.experiments.results import FACTS, KIND, META, RECIPE, SCORES, SIZES, Record, Results, write_without_texts
from mta_lab.reports import figures
from mta_lab.reports.exhibits import sections
from mta_lab.reports.sets import overview, primary

ANSWERS = "answers"
_SHOWN = ("command", "commit", "machine", "threads", "versions", "exhibits", "hours", "stopped", "remark")  # of a run


def report(folders: Sequence[Path], out: Path, *, texts: bool = False) -> list[str]:
    """Write the report of each experiment and of each other run. Returns what was drawn.

    Each gets a folder under ``out`` with ``README.md``, ``index.html``, and pictures (SVG and PNG). An experiment's
    folder also holds what is needed to draw it again: scores without texts (compressed), sizes, and settings. ``texts``
    adds the files with people's texts: every method's answers in LaMP's format under ``answers/``.
    Raises DataError.
    """
    experiments = [Results.read(folder) for folder in folders if _is_experiment(folder)]
    runs = {folder.resolve(): run_sections(folder) for folder in folders if not _is_experiment(folder)}
    names = [one.name for one in experiments] + [folder.name for folder in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(
            f"two folders would have the report {out / min(twice)}", hint="Write their reports to different --out."
        )
    if own := [folder for folder in runs if (out / folder.name).resolve() == folder]:
        raise DataError(
            f"the report of {own[0]} would be written into that folder", hint="Choose another folder with --out."
        )
    tests = [one for one in experiments if one.meta.get("which", "test") == "test"]
    claims = primary([one for one in tests if one.meta["exhibits"] != ["efficiency"]])  # which is about costs
    named = [Section("Primary comparisons, named in advance", claims)] if claims else []
    drawn = []
    for experiment in experiments:
        more = named if len(experiments) == 1 else []
        titles = _experiment(experiment, out / experiment.name, texts, more)
        drawn += [f"{experiment.name}: {title}" for title in titles]
    if len(experiments) > 1:
        write_report(out, "Every set", overview(experiments), named)
    for folder, made in runs.items():
        times = _sittings(folder)
        write_report(out / folder.name, f"{folder.name}: {times[-1]['kind']}", history(times), made)
        drawn += [f"{folder.name}: {section.title}" for section in made]
    return drawn


def write_report(folder: Path, title: str, head: str, sections: Sequence[Section]) -> None:
    """Write a report as ``README.md`` with pictures beside it (SVG and PNG), and as ``index.html``."""
    text = f"# {title}\n\n{head}\n"
    for section in sections:
        text += f"## {section.title}\n\n{section.text}\n"
        for name, picture in section.pictures.items():
            picture.save(folder / name)
            text += f"![{section.title}]({name}.svg)\n\n"
    write_text(folder / "README.md", text)
    write_text(folder / "index.html", page(title, head, sections))


# -- experiments -------------------------------------------------------------------------------------------------------


def _is_experiment(folder: Path) -> bool:
    """Return whether a folder contains an experiment's scores rather than one run."""
    runs = sittings(folder)
    return runs[-1]["kind"] == KIND if runs else any((folder / name).exists() for name in (SCORES, f"{SCORES}.gz"))


def _experiment(experiment: Results, folder: Path, texts: bool, more: Sequence[Section]) -> list[str]:
    if not texts and (folder / ANSWERS).exists():
        raise DataError(
            f"{folder / ANSWERS} holds people's texts, from an earlier report with --texts",
            hint="Remove that folder, or write to another --out.",
        )
    make_folder(folder)
    made = [*sections(experiment), *more]
    _copy(experiment, folder, texts)
    write_report(folder, experiment.recipe.about or experiment.name, _sizes(experiment), made)
    return [section.title for section in made]


def lamp_answers(records: Sequence[Record], task: Task, folder: Path) -> None:
    """Write each method's answers in LaMP's format: one file per method, bank, seed, and number of shots.

    A number tells methods with the same name apart. ``golds-<shots>.json`` contains the true answers to all questions
    with so many shots, for the benchmark's own script. A method that answered fewer of them has a file of golds of its
    own. Results without written answers are left out.
    """
    files, golds = defaultdict[str, dict[str, str]](dict), defaultdict[int, dict[str, str]](dict)
    shots: dict[str, int] = {}
    written = [record for record in records if record.full]
    named: dict[str, set[str]] = {}  # classes of the methods with the same name
    for record in written:
        named.setdefault(_slug(record.method), set()).add(record.kind)
    for record in written:
        name = _slug(f"{record.method} {record.bank} {record.shots} {record.seed}")
        number = sorted(named[_slug(record.method)]).index(record.kind) + 1
        called = f"{name}-{number}" if number > 1 else name
        shots[called] = record.shots
        files[called].update(zip(record.ids, record.answers))
        golds[record.shots].update(zip(record.ids, record.golds))
    for called, count in shots.items():
        if files[called].keys() != golds[count].keys():
            files[f"{called}-golds"] = {id: golds[count][id] for id in files[called]}
    for name, rows in (files | {f"golds-{count}": rows for count, rows in golds.items()}).items():
        write_json(folder / f"{name}.json", task.outputs(sorted(rows.items())))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _copy(experiment: Results, folder: Path, texts: bool) -> None:
    if folder.resolve() == experiment.folder.resolve():
        return
    write_without_texts(experiment.records, folder / f"{SCORES}.gz")
    runs = [{name: run[name] for name in _SHOWN if name in run} for run in experiment.meta.get("runs", ())]
    meta = experiment.meta | {"runs": runs}
    for name, value in ((SIZES, experiment.sizes), (META, meta), (FACTS, experiment.facts)):
        if value:
            write_json(folder / name, value)
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier experiment
    recipe = experiment.folder / RECIPE
    copy_file(recipe if recipe.exists() else experiment.folder.parent / RECIPE, folder / RECIPE)
    if texts:
        lamp_answers(experiment.records, experiment.task, folder / ANSWERS)


def _sizes(experiment: Results) -> str:
    sizes, meta = experiment.sizes, experiment.meta
    parts = [f"{name} {sizes[name]}" for name in ("task", "candidates", "development", "test") if name in sizes]
    enough = [f"{count} for {m}" for m, count in sizes.get("test people with shots", {}).items()]
    note = f" ({meta['note']})" if meta.get("note") else ""
    return (
        f"People: {sizes.get('people')} in all, {sizes.get('qualified')} with enough items. Parts: {', '.join(parts)}. "
        f"Test people with enough items, by number of shots: {', '.join(enough)}. Anchors: {sizes.get('anchors')}.\n\n"
        f"Base: {meta.get('base')}{note}, {meta.get('dtype')}. "
        f"Merge-then-Adapt (arXiv:2511.20072), protocol reconstructed.\n\n{history(meta.get('runs', ()))}"
    )


# -- other runs --------------------------------------------------------------------------------------------------------


def run_sections(folder: Path) -> list[Section]:
    """Return the outcome of a run, its methods if it is a comparison, and its losses.

    Raises DataError if the folder contains no run, or a file that is not readable.
    """
    last = _sittings(folder)[-1]
    rows = [
        [
            name,
            ", ".join(f"{key} {inner}" for key, inner in value.items()) if isinstance(value, Mapping) else str(value),
        ]
        for name, value in last["outcome"].items()
    ]
    outcome = Section("Outcome", markdown(["result", "value"], rows))
    return [outcome, *_methods(folder / "results.json"), *_losses(folder, last["work"])]


def history(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return one line of Markdown for each sitting: command, hours, machine, commit, versions, remark."""
    text = ""
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        took = "stopped before its end" if run["hours"] is None else f"{run['hours']:.2f} hours"
        took += ", then stopped" * bool(run.get("stopped"))
        made = f"{run['command'] or 'from Python'}: {took} on {run['machine']}, {run['threads']} threads"
        remark = f" ({run['remark']})" if run.get("remark") else ""
        text += f"- {made}; commit {run['commit'] or 'unknown'}; {versions}{remark}\n"
    return text


def _sittings(folder: Path) -> list[dict[str, Any]]:
    """Return the sittings of a run, oldest first. Raises DataError if the folder contains no run."""
    if runs := sittings(folder):
        return runs
    raise DataError(
        f"{folder} is not a run's folder: it contains no {RUN}",
        hint="Give the --out of mta bank build, compare, attack, evaluate or demo, or the --run of mta personalize.",
    )


def _methods(path: Path) -> list[Section]:
    """The scores of a comparison, and the differences to the pooled model."""
    try:
        comparison = json.loads(path.read_text(encoding="utf-8"))
        if "methods" not in comparison:
            return []  # of a privacy attack
        rows = {row["name"]: row for row in comparison["methods"]}
        measure = "NLL" if any("NLL" in row["metrics"] for row in rows.values()) else comparison["primary"]
        scores = {n: Interval(**row["metrics"][measure]) for n, row in rows.items() if measure in row["metrics"]}
        pooled = {name: row["differences"].get(POOLED, {}).get(measure) for name, row in rows.items()}
        differences = [(name, Interval(**one)) for name, one in pooled.items() if one]
        people = comparison["people"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} contains no results of a comparison: {error}", hint="Repeat  mta compare --out"
        ) from None
    table = markdown(["method", measure], [[name, str(score)] for name, score in scores.items()])
    text = f"{people} people; means over people, 95% intervals in brackets.\n\n{table}"
    side = {"lower": "left", "higher": "right"}[better_side(measure)]
    label = f"{measure} against {POOLED} (95% intervals; {side} is better)"
    return [Section("Methods", text, {"methods": figures.forest(differences, label)} if differences else {})]


def _losses(folder: Path, work: str) -> list[Section]:
    losses: dict[str, list[float]] = {}
    for line in lines(folder, work):
        if line.get("loss") is not None:
            losses.setdefault(line["stage"], []).append(line["loss"])
    if not losses:
        return []
    rows = [
        [stage, f"{statistics.fmean(values[-max(len(values) // 10, 1) :]):.3f}", str(len(values))]
        for stage, values in losses.items()
    ]
    text = "The mean over the last tenth of a stage's steps, in nats per target token.\n\n"
    return [Section("Losses", text + markdown(["stage", "loss", "steps"], rows), {"losses": figures.curves(losses)})]
