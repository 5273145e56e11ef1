"""``mta report``: reads result files, writes a folder with tables, pictures, and a page for each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mta.errors import DataError
from mta.evaluation.experiments.results import BEFORE, CASE, FACTS, RECIPE, SCORES, SIZES, Record, Results, publish
from mta.evaluation.reports.exhibits import sections
from mta.evaluation.reports.page import write_report
from mta.evaluation.reports.runs import history, is_experiment, read_run, run_sections
from mta.evaluation.reports.tables import overview
from mta.system.atomic import copy_file, make_folder, write_json
from mta.tracking.run_folder import RUN


def report(folders: Sequence[Path], out: Path, *, texts: bool = False) -> list[str]:
    """Write the report of each experiment and of each other run. Returns what was drawn.

    Each gets a folder under ``out`` with ``README.md``, ``index.html``, and pictures (SVG and PNG). An experiment's
    folder also holds what is needed to draw it again: scores without texts (compressed), sizes, and settings. ``texts``
    adds the files with people's texts: the case study, and every method's answers in LaMP's format under ``answers/``.
    Raises DataError.
    """
    experiments = [Results.read(folder) for folder in folders if is_experiment(folder)]
    runs = {folder.resolve(): run_sections(folder) for folder in folders if not is_experiment(folder)}
    names = [found.name for found in experiments] + [folder.name for folder in runs]
    if twice := {folder.name for folder in runs if names.count(folder.name) > 1}:
        raise DataError(
            f"two folders would have the report {out / min(twice)}", hint="Write their reports to different --out."
        )
    drawn = []
    for found in experiments:
        drawn += [f"{found.name}: {title}" for title in _experiment(found, out / found.name, texts)]
    if len(experiments) > 1:
        write_report(out, "Every set", overview(experiments), [])
    for folder, made in runs.items():
        sessions = read_run(folder)
        write_report(out / folder.name, f"{folder.name}: {sessions[-1]['kind']}", history(sessions), made)
        drawn += [f"{folder.name}: {section.title}" for section in made]
    return drawn


def _experiment(found: Results, folder: Path, texts: bool) -> list[str]:
    make_folder(folder)
    if not texts and found.case:
        found.case.update(_without_texts(found.case))
    made = sections(found)
    _copy(found, folder, texts)
    write_report(folder, found.recipe.about or found.name, _sizes(found), made)
    return [section.title for section in made]


def lamp_answers(records: Sequence[Record], lamp: str, folder: Path) -> None:
    """Write each method's answers in LaMP's format: one file per method, bank, seed, and number of shots.

    ``golds-<shots>.json`` contains the true answers to the same questions, for the benchmark's own script.
    """
    files: dict[str, dict[str, str]] = {}
    for record in records:
        name = f"{record.method} {record.bank} {record.shots} {record.seed}".lower()
        for called, texts in ((name, record.answers), (f"golds {record.shots}", record.golds)):
            rows = files.setdefault(re.sub(r"[^a-z0-9]+", "-", called).strip("-"), {})
            rows.update(zip(record.ids, texts))
    for name, rows in files.items():
        ordered = [{"id": id, "output": text} for id, text in sorted(rows.items())]
        write_json(folder / f"{name}.json", {"task": lamp, "golds": ordered})


def _copy(found: Results, folder: Path, texts: bool) -> None:
    if folder.resolve() == found.folder.resolve():
        return
    publish(found.records, folder / f"{SCORES}.gz")
    beside: list[tuple[str, object]] = [
        (SIZES, found.sizes),
        (FACTS, found.facts),
        (CASE, found.case),
    ]
    for name, value in beside:
        if value:
            write_json(folder / name, value)
    recipe = found.folder / RECIPE
    copy_file(recipe if recipe.exists() else found.folder.parent / RECIPE, folder / RECIPE)
    for name in (RUN, BEFORE):
        if (found.folder / name).exists():
            copy_file(found.folder / name, folder / name)
    if texts:
        lamp_answers(found.records, found.task.lamp or found.task.name, folder / "answers")


def _without_texts(case: dict[str, Any]) -> dict[str, Any]:
    """A case that can be published: labels and numbers, without shots, question, and written answers."""
    labelled = all(answer["labels"] for answer in case["answers"].values())
    answers = {name: one | ({} if labelled else {"text": ""}) for name, one in case["answers"].items()}
    return {"shots": [], "query": "", "answers": answers} | ({} if labelled else {"gold": ""})


def _sizes(found: Results) -> str:
    sizes, meta = found.sizes, found.meta
    parts = ", ".join(
        f"{name} {sizes[name]}" for name in ("task", "candidates", "development", "test") if name in sizes
    )
    enough = ", ".join(f"{count} for {m}" for m, count in sizes.get("test people with shots", {}).items())
    return (
        f"People: {sizes.get('people')} in all, {sizes.get('qualified')} with enough items. Parts: {parts}. "
        f"Test people with enough items, by number of shots: {enough}. Anchors: {sizes.get('anchors')}.\n\n"
        f"Base: {meta.get('base')} ({meta.get('note')}), {meta.get('dtype')}. "
        f"Merge-then-Adapt (arXiv:2511.20072), protocol reconstructed.\n\n{history(meta.get('runs', ()))}"
    )
