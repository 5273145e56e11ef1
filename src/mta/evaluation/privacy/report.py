"""Results of a privacy attack as a table, a picture, and JSON. They contain numbers, no ids and no texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mta.evaluation.privacy.evaluator import Row
from mta.evaluation.privacy.membership import FPR, Attack
from mta.evaluation.privacy.runner import Findings
from mta.evaluation.privacy.sampling import AT_LEAST
from mta.evaluation.reports.figures import forest
from mta.evaluation.statistics import Interval
from mta.system.atomic import write_json

GUESSING = 0.5


def show(found: Findings, console: Console) -> None:
    """Print the table, the attacked people, and warnings."""
    console.print(table(found))
    for sentence in sentences(found):
        console.print(sentence, highlight=False)


def table(found: Findings) -> Table:
    """Return one row per kind of model, grouped by the attacked items. The TPR is that of the row's last attack."""
    names = list(dict.fromkeys(name for row in found.rows for name in row.attacks))
    built = Table(title="Membership inference by loss", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    built.add_column("model")
    for name in [f"AUC\n{name}" for name in names] + [f"TPR at\n{FPR:.0%} FPR"]:
        built.add_column(name, justify="right")
    about = ""
    for row in found.rows:
        if row.about != about:
            about = row.about
            built.add_section()
            built.add_row(f"[bold]{about}[/]")
        aucs = [_cell(row.attacks[name].auc) if name in row.attacks else "-" for name in names]
        built.add_row(f"  {row.name}", *aucs, _cell(last(row)[1].tpr))
    return built


def sentences(found: Findings) -> list[str]:
    """Return sentences: the attacked people, how to read the numbers, and what an anchor's coefficient reveals."""
    meta, items = found.meta, found.meta["items"]
    others = f"{items['others']} items of {meta['others']} people outside the bank"
    lines = [
        f"{items['anchors']} items of {meta['anchors']} anchors, {items['pool']} of {meta['pool']} people behind the "
        f"task LoRA, against {others}; {meta['targets']} targets with {meta['privacy']['shots']} shots each.",
        f"The score is minus the loss ({meta['loss']}), alone or relative to a model below; guessing has AUC 0.5 and "
        f"TPR {FPR:.2f}. 95% intervals over people. Base and task LoRA were not trained on any anchor's item.",
    ]
    if items["others"] < AT_LEAST:
        few = f"only {items['others']} items of others, fewer than {AT_LEAST}"
        lines.append(f"Warning: {few}: the TPR is not reliable.")
    if not meta["pool"]:
        lines.append("The task LoRA's own items were not attacked: the given people do not include all of its people.")
    if found.weights:
        lines.append(
            f"Spearman correlation of an anchor's |w| and how often its items rank above others': {found.weights} "
            f"over {found.pairs} pairs of a target's merge and an anchor."
        )
    return lines


def to_json(found: Findings, command: str | None = None) -> dict[str, Any]:
    """Return all findings as JSON values, with the ``command`` that repeats the attack if given."""
    rows = [
        {
            "about": row.about,
            "model": row.name,
            "models": row.models,
            "members": row.members,
            "others": row.others,
            "attacks": {n: {"auc": _values(one.auc), "tpr": _values(one.tpr)} for n, one in row.attacks.items()},
        }
        for row in found.rows
    ]
    weights = found.weights and {"spearman": _values(found.weights), "pairs": found.pairs}
    return {
        "meta": found.meta | ({} if command is None else {"command": command}),
        "fpr": FPR,
        "rows": rows,
        "weights": weights,
    }


def write(found: Findings, out: Path, command: str = "") -> None:
    """Write ``results.json``, ``privacy.svg``, and ``privacy.png`` to ``out``. ``command`` reproduces them."""
    write_json(out / "results.json", to_json(found, command=command))
    rows = [(f"{row.about}: {row.name}", _less(last(row)[1].auc)) for row in found.rows]
    forest(rows, "AUC - 0.5: 0 is guessing (95% intervals)").save(out / "privacy")


def last(row: Row) -> tuple[str, Attack]:
    """Return the strongest attack: relative to the highest model below."""
    return list(row.attacks.items())[-1]


def _less(auc: Interval) -> Interval:
    return Interval(auc.mean - GUESSING, auc.low - GUESSING, auc.high - GUESSING)


def _cell(one: Interval) -> str:
    return f"{one.mean:.3f}\n[dim]{one.low:.2f} to {one.high:.2f}[/]"


def _values(one: Interval) -> dict[str, float]:
    return {"mean": one.mean, "low": one.low, "high": one.high}
