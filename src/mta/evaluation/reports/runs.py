"""Runs beside each other, from their folders alone: what differs, how loss fell, and what came out."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mta.errors import DataError
from mta.evaluation.experiments.records import FILE
from mta.evaluation.experiments.runner import KIND
from mta.evaluation.metrics import BETTER_LOW
from mta.evaluation.reports import plots
from mta.evaluation.reports.exhibits import Section
from mta.evaluation.reports.figures import human_seconds
from mta.evaluation.reports.tables import POOLED, markdown
from mta.evaluation.statistics import Interval
from mta.tracking.run_folder import RUN, lines, sittings

FACTS = ("machine", "threads", "device", "commit", "bank")  # beside settings and versions
RECIPES = ("run.", "evaluation.")  # groups of a recipe that are settings of their own elsewhere
LONG = 48  # characters of a cell
CURVE = 5  # steps from which on there is something to be seen


@dataclass(frozen=True, slots=True)
class Kept:
    """One run's folder as it is read back; ``steps`` are the lines of its metrics by stage, ``results`` may be {}."""

    name: str
    sittings: list[dict[str, Any]]
    steps: dict[str, list[dict[str, Any]]]
    results: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, name: str) -> Kept:
        """Raises DataError where there is no run, or a file of it is not readable."""
        if not (told := sittings(folder)):
            raise DataError(
                f"{folder} is no folder of a run: it holds no {RUN}",
                hint="Give the --out of mta bank build, mta evaluate or mta demo, or the --run of mta personalize.",
            )
        steps: dict[str, list[dict[str, Any]]] = {}
        for line in lines(folder, told[-1]["work"]):
            steps.setdefault(line["stage"], []).append(line)
        return cls(name, told, steps, _results(folder / "results.json"))

    @property
    def last(self) -> dict[str, Any]:
        """The newest sitting."""
        return self.sittings[-1]

    def losses(self, stage: str) -> list[float]:
        """The loss at every step of a stage that had one."""
        return [line["loss"] for line in self.steps.get(stage, ()) if line.get("loss") is not None]

    def told(self) -> dict[str, Any]:
        """Settings and facts by their names."""
        found = {_plain(key): value for key, value in _flat(self.last["settings"]).items()}
        found |= {name: self.last[name] for name in FACTS if name in self.last}
        return found | {f"version of {name}": version for name, version in self.last["versions"].items()}


def is_experiment(folder: Path) -> bool:
    """Whether a folder holds an experiment's scores rather than one run."""
    told = sittings(folder)
    return told[-1]["kind"] == KIND if told else any((folder / name).exists() for name in (FILE, f"{FILE}.gz"))


def read_runs(folders: Sequence[Path]) -> list[Kept]:
    """Every folder once, by as much of its path as tells it from the others."""
    whole = list(dict.fromkeys(folder.resolve() for folder in folders))
    parts = 1
    while len({path.parts[-parts:] for path in whole}) < len(whole):
        parts += 1
    return [Kept.read(path, "/".join(path.parts[-parts:])) for path in whole]


def compared(runs: Sequence[Kept], folder: Path) -> list[Section]:
    """What is said of runs side by side, its pictures drawn into ``folder``."""
    curves = [_losses(runs), *_curves(runs, folder)] if any(run.steps for run in runs) else []
    return [_table(runs), _differences(runs), *_methods(runs, folder), *curves, _commands(runs)]


def _table(runs: Sequence[Kept]) -> Section:
    rows = []
    for run in runs:
        when = str(run.last["begun"])[:16].replace("T", " ")
        rows.append([run.name, run.last["kind"], when, _took(run), _outcome(run.last["outcome"])])
    return Section("Runs", markdown(["run", "kind", "begun (UTC)", "took", "outcome"], rows))


def _took(run: Kept) -> str:
    """Of all sittings that worked on what the last one did."""
    mine = [one for one in run.sittings if one["work"] == run.last["work"]]
    ended = [one for one in mine if one["hours"] is not None]
    told = human_seconds(3600 * sum(one["hours"] for one in ended)) if ended else ""
    if run.last["hours"] is None:
        return f"{told}, then died" if told else "died"
    if run.last.get("stopped"):
        return f"stopped after {told}"
    return f"{told} in {len(mine)} sittings" if len(mine) > 1 else told


def _outcome(outcome: Mapping[str, Any]) -> str:
    said = []
    for name, value in outcome.items():
        if isinstance(value, Mapping) and value:
            best = (min if name in BETTER_LOW else max)(value, key=lambda one: value[one])
            said.append(f"{'lowest' if name in BETTER_LOW else 'highest'} {name}: {best} {value[best]:.3f}")
        elif value or name not in ("failed", "shortened", "texts shortened", "items left out"):
            said.append(f"{name} {value}")
    return ", ".join(said) or "-"


def _differences(runs: Sequence[Kept]) -> Section:
    told = [run.told() for run in runs]
    names = list(dict.fromkeys(name for one in told for name in one))
    rows, same = [], []
    for name in names:
        values = {json.dumps(one[name]) for one in told if name in one}
        if len(values) > 1:
            rows.append([name, *(_cell(one.get(name, "")) for one in told)])
        elif (name in (*FACTS, "seed", "base") or name.startswith("version")) and sum(name in one for one in told) > 1:
            same.append(f"{name} {_cell(next(one[name] for one in told if name in one))}")
    said = f"The same in all that have it: {', '.join(same)}.\n\n" if same else ""
    if not rows:
        return Section("What differs", f"{said}No setting differs.\n")
    return Section("What differs", said + markdown(["setting", *(run.name for run in runs)], rows))


def _methods(runs: Sequence[Kept], folder: Path) -> list[Section]:
    """Comparisons: every method's score side by side, and a picture of the differences to the pooled model."""
    asked = [run for run in runs if run.results]
    if not asked:
        return []
    scores = [{row["name"]: row for row in run.results["methods"]} for run in asked]
    names = list(dict.fromkeys(name for one in scores for name in one))
    metric = "NLL" if any("NLL" in row["metrics"] for one in scores for row in one.values()) else _primary(asked)
    rows = []
    for name in names:
        found = [_interval(one.get(name, {}).get("metrics", {}).get(metric)) for one in scores]
        if any(found):
            rows.append([name, *(f"{i.mean:.3f} [{i.low:.3f}, {i.high:.3f}]" if i else "" for i in found)])
    people = [f"{run.name} ({run.results['people']} people)" for run in asked]
    against = [
        (name, [_interval(one.get(name, {}).get("differences", {}).get(POOLED, {}).get(metric)) for one in scores])
        for name in names
    ]
    against = [(name, found) for name, found in against if any(found)]
    if against:
        label = f"{metric} against {POOLED} (95% intervals; {'left' if metric in BETTER_LOW else 'right'} is better)"
        plots.beside(folder / "methods", against, [run.name for run in asked], label)
    text = f"{metric}, means over people, 95% intervals in brackets.\n\n" + markdown(["method", *people], rows)
    return [Section("Methods", text, ["methods"] if against else [])]


def _losses(runs: Sequence[Kept]) -> Section:
    """What each stage came to, side by side."""
    rows = []
    for stage in dict.fromkeys(stage for run in runs for stage in run.steps):
        losses = [run.losses(stage) for run in runs]
        rows.append([stage, *(f"{_end(one):.3f} ({len(one)} steps)" if one else "" for one in losses)])
    said = "The mean over the last tenth of a stage's steps, in nats per target token.\n\n"
    return Section("Loss at the end", said + markdown(["stage", *(run.name for run in runs)], rows))


def _curves(runs: Sequence[Kept], folder: Path) -> list[Section]:
    """A picture for each stage that two runs have; of one run, for each of its stages."""
    stages = list(dict.fromkeys(stage for run in runs for stage in run.steps))
    having = {stage: [run for run in runs if len(run.losses(stage)) >= CURVE] for stage in stages}
    shared = {stage: found for stage, found in having.items() if len(found) > 1}
    made = []
    for n, (stage, found) in enumerate((shared or {s: f for s, f in having.items() if f}).items()):
        plots.curves(folder / f"loss-{n}", {run.name: run.losses(stage) for run in found}, f"loss, {stage}")
        made.append(Section(f"Loss: {stage}", "", [f"loss-{n}"]))
    return made


def _commands(runs: Sequence[Kept]) -> Section:
    said = [f"- {run.name}: {one['command'] or 'from Python'}\n" for run in runs for one in run.sittings]
    return Section("How they were made", "".join(dict.fromkeys(said)))


def _end(losses: Sequence[float]) -> float:
    return statistics.fmean(losses[-max(len(losses) // 10, 1) :])


def _results(path: Path) -> dict[str, Any]:
    """What a comparison found; nothing where there was none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if "methods" not in found:
            return {}
        if all(isinstance(row["metrics"], dict) and row["name"] for row in found["methods"]) and found["people"]:
            return dict(found)
        raise ValueError("a method has no metrics")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} holds no results of a comparison: {error}", hint="Make it anew: mta evaluate --out"
        ) from None


def _primary(runs: Sequence[Kept]) -> str:
    return str(runs[0].results["primary"])


def _interval(found: Mapping[str, float] | None) -> Interval | None:
    return Interval(found["mean"], found["low"], found["high"]) if found else None


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found


def _plain(key: str) -> str:
    return next((key.removeprefix(group) for group in RECIPES if key.startswith(group)), key)


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = text.replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= LONG else f"…{text[1 - LONG :]}"
