"""The report of one run's folder: its outcome, its methods if the run is a comparison, and its losses."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mta.errors import DataError
from mta.evaluation.experiments.results import KIND, SCORES
from mta.evaluation.metrics import BETTER_LOW
from mta.evaluation.reports import figures
from mta.evaluation.reports.page import Section
from mta.evaluation.reports.tables import POOLED, markdown
from mta.evaluation.statistics import Interval
from mta.tracking.run_folder import RUN, lines, sittings


def is_experiment(folder: Path) -> bool:
    """Return whether a folder contains an experiment's scores rather than one run."""
    runs = sittings(folder)
    return runs[-1]["kind"] == KIND if runs else any((folder / name).exists() for name in (SCORES, f"{SCORES}.gz"))


def read_run(folder: Path) -> list[dict[str, Any]]:
    """Return the sessions of a run, oldest first. Raises DataError if the folder contains no run."""
    if runs := sittings(folder):
        return runs
    raise DataError(
        f"{folder} is not a run's folder: it contains no {RUN}",
        hint="Give the --out of mta bank build, mta evaluate or mta demo, or the --run of mta personalize.",
    )


def run_sections(folder: Path) -> list[Section]:
    """Return the sections for a run's folder. Raises DataError for a file that is not readable."""
    last = read_run(folder)[-1]
    return [_outcome(last["outcome"]), *_methods(folder / "results.json"), *_losses(folder, last["work"])]


def history(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return one line of Markdown for each session: command, hours, machine, commit, versions."""
    text = ""
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        took = "stopped before its end" if run["hours"] is None else f"{run['hours']:.2f} hours"
        took += ", then stopped" * bool(run.get("stopped"))
        made = f"{run['command'] or 'from Python'}: {took} on {run['machine']}, {run['threads']} threads"
        text += f"- {made}; commit {run['commit'] or 'unknown'}; {versions}\n"
    return text


def _outcome(outcome: Mapping[str, Any]) -> Section:
    rows = [
        [
            name,
            ", ".join(f"{key} {inner}" for key, inner in value.items()) if isinstance(value, Mapping) else str(value),
        ]
        for name, value in outcome.items()
    ]
    return Section("Outcome", markdown(["result", "value"], rows))


def _methods(path: Path) -> list[Section]:
    """The scores of a comparison, and the differences to the pooled model."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if "methods" not in found:
            return []  # of a privacy attack
        rows = {row["name"]: row for row in found["methods"]}
        measure = "NLL" if any("NLL" in row["metrics"] for row in rows.values()) else found["primary"]
        scores = {n: Interval(**row["metrics"][measure]) for n, row in rows.items() if measure in row["metrics"]}
        pooled = {name: row["differences"].get(POOLED, {}).get(measure) for name, row in rows.items()}
        differences = [(name, Interval(**one)) for name, one in pooled.items() if one]
        people = found["people"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} contains no results of a comparison: {error}", hint="Repeat  mta evaluate --out"
        ) from None
    table = [[name, f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]"] for name, one in scores.items()]
    text = f"{people} people; means over people, 95% intervals in brackets.\n\n" + markdown(["method", measure], table)
    label = f"{measure} against {POOLED} (95% intervals; {'left' if measure in BETTER_LOW else 'right'} is better)"
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
