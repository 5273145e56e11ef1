"""Results of a privacy attack as a table, a picture, and JSON. They contain numbers, no ids and no texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mta.evaluation.statistics import Interval
from mta.system.atomic import write_json
from mta_lab.privacy.membership import FPR, Attack
from mta_lab.privacy.runner import ANCHORS, AttackRow, Findings
from mta_lab.privacy.sampling import AT_LEAST
from mta_lab.reports.figures import forest


def show(findings: Findings, console: Console) -> None:
    """Print the table, the attacked people, and warnings."""
    console.print(table(findings))
    for sentence in sentences(findings):
        console.print(sentence, highlight=False)


def table(findings: Findings) -> Table:
    """Return one row per kind of model, grouped by the attacked items. The TPR is that of ``judged``."""
    names = list(dict.fromkeys(name for row in findings.rows for name in row.attacks))
    built = Table(title="Membership inference by loss", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    built.add_column("model")
    for name in [f"AUC\n{name}" for name in names] + [f"TPR at\n{FPR:.0%} FPR"]:
        built.add_column(name, justify="right")
    about = ""
    for row in findings.rows:
        if row.about != about:
            about = row.about
            built.add_section()
            built.add_row(f"[bold]{about}[/]")
        aucs = [_cell(row.attacks[name].auc) if name in row.attacks else "-" for name in names]
        built.add_row(f"  {row.model}", *aucs, _cell(judged(row, findings.meta)[1].tpr))
    return built


def sentences(findings: Findings) -> list[str]:
    """Return sentences: the attacked people, how to read the numbers, and what an anchor's coefficient reveals."""
    meta, items = findings.meta, findings.meta["items"]
    others = f"{items['others']} items of {meta['others']} people outside the bank"
    attacked = f"{items['anchors']} items of {meta['anchors']} anchors"
    untrained = "was not trained on any anchor's item"
    if has_task_lora := meta.get("task LoRA", True):  # published results may lack it
        attacked += f", {items['pool']} of {meta['pool']} people behind the task LoRA"
        pooled = "on many: judge anchors over the base" if meta["anchors pooled"] else "was not either"
        untrained += f", and the task LoRA {pooled}"
    lines = [
        f"{attacked}, against {others}; {meta['targets']} targets with {meta['privacy']['shots']} shots each.",
        f"The score is minus the loss ({meta['loss']}), alone or relative to a model below; guessing has AUC 0.5 and "
        f"TPR {FPR:.2f}. 95% intervals over people. The base {untrained}.",
    ]
    if items["others"] < AT_LEAST:
        few = f"only {items['others']} items of others, fewer than {AT_LEAST}"
        lines.append(f"Warning: {few}: the TPR is not reliable.")
    if has_task_lora and not meta["pool"]:
        lines.append("The task LoRA's own items were not attacked: the given people do not include all of its people.")
    return lines


def to_json(findings: Findings, command: str | None = None) -> dict[str, Any]:
    """Return all findings as JSON values, with the ``command`` that repeats the attack if given."""
    return {
        "meta": findings.meta | ({} if command is None else {"command": command}),
        "fpr": FPR,
        "rows": [asdict(row) for row in findings.rows],
    }


def write(findings: Findings, out: Path, command: str = "") -> None:
    """Write ``results.json``, ``privacy.svg``, and ``privacy.png`` to ``out``. ``command`` reproduces them."""
    write_json(out / "results.json", to_json(findings, command=command))
    rows = []
    for row in findings.rows:
        name, one = judged(row, findings.meta)
        shifted = Interval(one.auc.mean - 0.5, one.auc.low - 0.5, one.auc.high - 0.5)
        rows.append((f"{row.about}: {row.model}, {name}", shifted))
    forest(rows, "AUC - 0.5: 0 is guessing (95% intervals)").save(out / "privacy")


def judged(row: AttackRow, meta: Mapping[str, Any]) -> tuple[str, Attack]:
    """Return the attack, with its name, that the row is judged by: the one relative to the highest model below.

    A task LoRA that was trained on the anchors' items is no reference for these: the attack is relative to the base.
    """
    names = list(row.attacks)
    last = "over base" if row.about == ANCHORS and meta["anchors pooled"] and "over base" in names else names[-1]
    return last, row.attacks[last]


def _cell(one: Interval) -> str:
    return f"{one.mean:.3f}\n[dim]{one.low:.2f} to {one.high:.2f}[/]"
