"""Comparisons as tables, in Markdown and on the terminal: scores, paired differences, numbers of worse-off people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mta.evaluation.metrics import COLUMNS, MEANING
from mta.evaluation.reports.summary import CHEAP, OURS, POOLED, RIVAL, better_side, judge, metrics_of, title_of, verdict
from mta.evaluation.statistics import Comparison, Interval
from mta.system.units import human_bytes, human_seconds

_COLOURS = {"better": "green", "worse": "red", "unclear": "default"}

# -- Markdown ----------------------------------------------------------------------------------------------------------


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. The first column contains names, the others numbers."""
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def rows_of(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the heads and rows of a comparison, one row per method. Empty columns are left out."""
    names, people, measure = comparison.names, comparison.people, comparison.yardstick
    columns = {"method": names}
    for metric in dict.fromkeys((*COLUMNS[comparison.task.metric], measure)):
        shown = str if metric.startswith("ROUGE") else lambda score: f"{score.mean:.3f}"
        columns[metric] = [shown(score) if (score := comparison.score(name, metric)) else "" for name in names]
    for metric in dict.fromkeys((measure, comparison.primary)):
        for other in (POOLED, *CHEAP, RIVAL):
            columns[f"{metric} against {other}"] = [marked(comparison, metric, name, other) for name in names]
    shares = [comparison.worse_off(name, POOLED) for name in names]
    columns["worse off"] = [f"{s[0] * people:.0f} of {people}" if s else "" for s in shares]
    columns["clearly"] = ["" if s is None or s[1] is None else f"{s[1] * people:.0f}" for s in shares]
    columns["s per person"] = [f"{row.seconds / people:.2f}" for row in comparison.rows]
    columns["prompt tokens"] = [f"{row.prompt_tokens:.0f}" if row.prompt_tokens else "" for row in comparison.rows]
    columns["kept each"] = [human_bytes(row.bytes_per_person) for row in comparison.rows]
    filled = {head: cells for head, cells in columns.items() if any(cells)}
    return list(filled), list(map(list, zip(*filled.values())))


def marked(comparison: Comparison, metric: str, name: str, other: str = POOLED) -> str:
    """Return the difference of two methods with its interval, in bold if the interval excludes zero."""
    difference = comparison.difference(name, other, metric)
    if difference is None:
        return ""
    text = f"{difference.mean:+.3f} {brackets(difference)}"
    return text if judge(metric, difference, comparison.independent) == "unclear" else f"**{text}**"


# -- the terminal ------------------------------------------------------------------------------------------------------


def show(comparison: Comparison, meta: Mapping[str, Any], console: Console) -> None:
    """Print the scores, and the findings in sentences."""
    show_scores(comparison, console)
    note = f" ({meta['note']})" if meta["note"] else ""
    queries = comparison.queries_each or meta["queries"]
    lines = [
        f"{meta['people']} people, {meta['shots']} shots and {queries} later queries each; "
        f"{meta['base']}{note}, {meta['dtype']}, {'seeds' if len(meta['seeds']) > 1 else 'seed'} "
        + ", ".join(map(str, meta["seeds"]))
    ]
    if meta.get("left_out"):
        lines.append(f"{meta['left_out']} people left out: in the bank, sharing items with it, or with too few items")
    lines += [f"  {sentence}" for sentence in verdict(comparison)]
    for line in lines:
        console.print(line, highlight=False, markup=False)


def show_scores(comparison: Comparison, console: Console) -> None:
    """Print one line per method, and how to read it."""
    means = [
        f"{m}: {MEANING[m] + ', ' if m in MEANING else ''}{better_side(m)} is better." for m in metrics_of(comparison)
    ]
    console.print(f"\n[bold]{title_of(comparison)}[/]; all methods learn from the same items", highlight=False)
    console.print(table(comparison))
    console.print(
        f"{' '.join(means)} Change: difference to {POOLED}, one model for all, with its 95% interval over people. "
        f"Harmed: people who are clearly worse off than with {POOLED}. Prompt: tokens of a question. "
        "Time: training of all people. Kept: bytes per person.",
        highlight=False,
    )


def table(comparison: Comparison) -> Table:
    """Return one row per method: scores, the change from the pooled model, people worse off, time, and bytes."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
    people, metrics = comparison.people, metrics_of(comparison)
    for title in ("method", *metrics, "change", "harmed", "prompt", "time", "kept"):
        made.add_column(title, justify="left" if title == "method" else "right")
    for row in comparison.rows:
        scores = [comparison.score(row.name, metric) for metric in metrics]
        shares = comparison.worse_off(row.name, POOLED)
        made.add_row(
            f"[bold]{OURS}[/]" if row.name == OURS else escape(row.name),
            *(f"{score.mean:.3f}" if score else "" for score in scores),
            _change(comparison, row.name),
            f"{shares[1] * people:.0f} of {people}" if shares and shares[1] is not None else "",
            f"{row.prompt_tokens:.0f}" if row.prompt_tokens else "",
            human_seconds(row.seconds),
            human_bytes(row.bytes_per_person),
        )
    return made


def _change(comparison: Comparison, name: str) -> str:
    difference = comparison.difference(name, POOLED, comparison.yardstick)
    if difference is None:
        return ""
    said = judge(comparison.yardstick, difference, comparison.independent)
    return f"{difference.mean:+.3f} [{_COLOURS[said]}]{said}[/]\n[dim]{escape(brackets(difference))}[/]"


def brackets(interval: Interval) -> str:
    """Return an interval in brackets, with signs."""
    return f"[{interval.low:+.3f}, {interval.high:+.3f}]"
