"""A comparison on the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mta.evaluation.metrics import BETTER_LOW
from mta.evaluation.reports.figures import human_bytes, human_seconds
from mta.evaluation.reports.summary import judge, names_of, title_of, units_in, verdict, worse_off, yardstick
from mta.evaluation.reports.tables import POOLED
from mta.evaluation.statistics import WORSE, Comparison, Interval

_HIDDEN = {"RMSE", "NLL"}  # of the other metrics: RMSE repeats MAE, and NLL has columns of its own
_TITLES = {"MAE (median)": "median\nMAE"}
_COLOURS = {"better": "green", "worse": "red"}


@dataclass(frozen=True, slots=True)
class Cell:
    """A value of the table, a note below, and whether the value is clearly better or worse than the pooled model's."""

    text: str = "-"
    note: str = ""
    mark: str = ""
    best: bool = False


def show(
    comparison: Comparison, meta: Mapping[str, Any], questions: Sequence[Mapping[str, Any]], console: Console
) -> None:
    """Print the table, the findings in sentences, and the answers to questions before and after."""
    console.print(table(comparison))
    note = f" ({meta['note']})" if meta["note"] else ""
    asked = f"{meta['people']} people, {meta['shots']} shots and {meta['queries']} later queries each"
    console.print(f"{asked}; {meta['base']}{note}, {meta['dtype']}, seed {meta['seed']}", highlight=False)
    if meta.get("left_out"):
        few = meta["shots"] + meta["queries"]
        console.print(f"{meta['left_out']} people left out: in the bank, or fewer than {few} items", highlight=False)
    for sentence in verdict(comparison):
        console.print(f"  {sentence}", highlight=False)
    for question in questions:
        console.print(f"\n{question['question']}\n  before, everybody: {question['before']}", highlight=False)
        for who, answer in question["after"]:
            console.print(f"  after, a person {who}: {answer}", highlight=False)


def table(comparison: Comparison) -> Table:
    """Return the table of a comparison: one row per method, the best value of a column in bold. Fits 80 columns."""
    caption = (
        "Means over people, 95% intervals in brackets, the best of a column in bold. Differences are paired; "
        "better or worse: the interval excludes zero. "
        f"Worse off: NLL more than {WORSE:g} above that of {POOLED}; clearly: a person's own 95% interval lies above "
        "zero. Training: the time for all people together."
    )
    made = Table(
        title=title_of(comparison),
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 0),
        show_edge=False,
    )
    names = [Cell(name) for name in names_of(comparison)]
    columns = {"method": names} | columns_of(comparison)
    for title, cells in columns.items():
        words = re.split("[ \n]", " ".join([title, *(f"{c.text} {c.mark} {c.note}" for c in cells)]))
        made.add_column(title, justify="left" if cells is names else "right", min_width=max(map(len, words)))
    for row in zip(*columns.values()):
        made.add_row(*map(_text, row))
    return made


def columns_of(comparison: Comparison) -> dict[str, list[Cell]]:
    """Return the columns of the table by their titles: one cell per method."""
    rows, first, measure = comparison.rows, comparison.primary, yardstick(comparison)
    others = dict.fromkeys(metric for row in rows for metric in row.people if metric not in {first, *_HIDDEN})
    made = {first: _scores(comparison, first, interval=True)}
    made |= {_TITLES.get(metric, metric): _scores(comparison, metric) for metric in others}
    if measure != first:
        made[measure] = _scores(comparison, measure)
    if POOLED in names_of(comparison):
        made[f"{measure} against\n{POOLED}"] = _differences(comparison, measure)
        if comparison.row(POOLED).nll is not None:
            made["people\nworse off"] = _worse(comparison)
    seconds, kept = [row.seconds for row in rows], [row.bytes_per_person for row in rows]
    made["training"] = _best([Cell(_whole(human_seconds(s))) for s in seconds], seconds)
    made["kept\neach"] = _best([Cell(_whole(human_bytes(b))) for b in kept], kept)
    return made


def _scores(comparison: Comparison, metric: str, interval: bool = False) -> list[Cell]:
    scores = [comparison.score(row.name, metric) for row in comparison.rows]
    cells = [Cell(f"{s.mean:.3f}", _brackets(s) if interval else "") if s else Cell() for s in scores]
    return _best(cells, [s.mean if s else None for s in scores], metric in BETTER_LOW)


def _differences(comparison: Comparison, metric: str) -> list[Cell]:
    differences = [comparison.difference(row.name, POOLED, metric) for row in comparison.rows]
    cells = []
    for row, difference in zip(comparison.rows, differences):
        if row.name == POOLED:
            cells.append(Cell("baseline"))
        elif difference is None:
            cells.append(Cell())
        else:
            judgement = judge(metric, difference, units_in(comparison))
            mark = "" if judgement == "unclear" else judgement
            cells.append(Cell(f"{difference.mean:+.3f}", _brackets(difference, "+"), mark))
    return _best(cells, [d.mean if d else None for d in differences], metric in BETTER_LOW)


def _worse(comparison: Comparison) -> list[Cell]:
    shares = [None if n == POOLED else worse_off(comparison, n, POOLED) for n in names_of(comparison)]
    notes = ["" if s is None or s[1] is None else f"{s[1]:.0%} clearly" for s in shares]
    cells = [Cell(f"{s[0]:.0%}", note) if s else Cell() for s, note in zip(shares, notes)]
    return _best(cells, [s[0] if s else None for s in shares])


def _best(cells: Sequence[Cell], values: Sequence[float | None], low: bool = True) -> list[Cell]:
    """Mark the cells with the lowest or the highest value."""
    known = [value for value in values if value is not None]
    best = (min if low else max)(known, default=None)
    return [replace(cell, best=value is not None and value == best) for cell, value in zip(cells, values)]


def _text(cell: Cell) -> Text:
    made = Text.assemble((cell.text, "bold" if cell.best else ""))
    if cell.mark:
        made.append(f" {cell.mark}", style=_COLOURS[cell.mark])
    return made.append(f"\n{cell.note}", style="dim") if cell.note else made


def _whole(value: str) -> str:
    return value.replace(" ", "\N{NO-BREAK SPACE}")


def _brackets(interval: Interval, sign: str = "") -> str:
    return f"[{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
