"""Comparisons as tables, in Markdown and on the terminal: scores, paired differences, numbers of worse-off people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mta.evaluation.experiments.results import Results
from mta.evaluation.metrics import BETTER_LOW, STEMMED
from mta.evaluation.reports.summary import NAME, POOLED, RIVAL, judge, title_of, verdict
from mta.evaluation.statistics import WORSE, Comparison, Interval, Resampled, corrected
from mta.system.units import human_bytes, human_seconds

_HIDDEN = {"RMSE", "NLL", *STEMMED}  # on the terminal: RMSE repeats MAE, stemmed ROUGE repeats ROUGE, NLL has columns
_TITLES = {"MAE (median)": "median\nMAE"}
_COLOURS = {"better": "green", "worse": "red"}

# -- Markdown ----------------------------------------------------------------------------------------------------------


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. The first column contains names, the others numbers."""
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def rows_of(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the heads and rows of a comparison, one row per method. Empty columns are left out."""
    names, people = comparison.names, comparison.people
    first, measure = comparison.primary, comparison.yardstick
    columns = {"method": names}
    for metric in dict.fromkeys((first, "MAE (median)", "accuracy", "ROUGE-1", *STEMMED, measure)):
        scores = [comparison.score(name, metric) for name in names]
        columns[metric] = [f"{score.mean:.3f}" if score else "" for score in scores]
    for metric in dict.fromkeys((measure, first)):
        for other in (POOLED, RIVAL):
            columns[f"{metric} against {other}"] = [marked(comparison, metric, name, other) for name in names]
    shares = [comparison.worse_off(name, POOLED) for name in names]
    columns["worse off"] = [f"{s[0] * people:.0f} of {people}" if s else "" for s in shares]
    columns["clearly"] = [f"{(s[1] or 0) * people:.0f}" if s else "" for s in shares]
    columns["s per person"] = [f"{row.seconds / people:.2f}" for row in comparison.rows]
    columns["kept each"] = [human_bytes(row.bytes_per_person) for row in comparison.rows]
    filled = {head: cells for head, cells in columns.items() if any(cells)}
    return list(filled), list(map(list, zip(*filled.values())))


def overview(many: Sequence[Results]) -> str:
    """Return the main table over data sets: each method's primary metric and its difference to the pooled model."""
    compared = [(found.name, comparison) for found in many if (comparison := found.comparison("main"))]
    if not compared:
        return ""
    names = list(dict.fromkeys(name for _, c in compared for name in c.names))
    heads, columns = ["method"], [names]
    for data, c in compared:
        measure, known = c.yardstick, c.names
        heads += [f"{data}: {c.primary}", f"{measure} against {POOLED}", "worse off"]
        columns.append([str(c.score(name, c.primary) or "") if name in known else "" for name in names])
        columns.append([marked(c, measure, name, POOLED) for name in names])
        shares = [c.worse_off(name, POOLED) for name in names]
        columns.append([f"{share[0]:.0%}" if share else "" for share in shares])
    return markdown(heads, list(zip(*columns)))


def primary(many: Sequence[Results]) -> str:
    """Return a table of the comparisons that the recipes name in advance, corrected for their number; may be empty.

    Each comparison is over the exhibit that covers most people, and then most seeds.
    """
    about: list[list[str]] = []
    tests: list[Resampled] = []
    for found, other in [(one, other) for one in many for other in one.recipe.primary]:
        tried: list[tuple[int, int, str, Resampled]] = []
        for name in ("seeds", "main"):
            comparison = found.comparison(name) if name in found.recipe.exhibits else None
            if comparison and (test := comparison.resampled(NAME, other, comparison.yardstick)):
                tried.append((comparison.people, len(found.seeds(name)), comparison.yardstick, test))
        if tried:
            people, seeds, measure, test = max(tried, key=lambda one: one[:2])
            about.append([found.name, measure, other, str(people), str(test.count), str(seeds)])
            tests.append(test)
    if not tests:
        return ""
    heads = ["set", "measure", f"{NAME} against", "people", "independent", "seeds", "difference", "p"]
    rows = [
        [*one, f"{found.mean:+.3f} {_brackets(found, '+')}", f"{p:.4f}"]
        for one, (found, p) in zip(about, corrected(tests))
    ]
    said = (
        f"Corrected for {len(tests)} comparisons: intervals cover together with 95% (Bonferroni), p-values are Holm's."
    )
    return f"{said}\n\n{markdown(heads, rows)}"


def marked(comparison: Comparison, metric: str, name: str, other: str = POOLED) -> str:
    """Return the difference of two methods with its interval, in bold if the interval excludes zero."""
    difference = comparison.difference(name, other, metric)
    if difference is None:
        return ""
    text = f"{difference.mean:+.3f} {_brackets(difference, '+')}"
    return text if judge(metric, difference, comparison.independent) == "unclear" else f"**{text}**"


# -- the terminal ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """A value of the table, a note below, and whether the value is clearly better or worse than the pooled model's."""

    text: str = "-"
    note: str = ""
    mark: str = ""
    best: bool = False


Valued = tuple[Cell, float | None]
_EMPTY: Valued = (Cell(), None)


def show(comparison: Comparison, meta: Mapping[str, Any], console: Console) -> None:
    """Print the table, and the findings in sentences."""
    console.print(table(comparison))
    note = f" ({meta['note']})" if meta["note"] else ""
    lines = [
        f"{meta['people']} people, {meta['shots']} shots and {meta['queries']} later queries each; "
        f"{meta['base']}{note}, {meta['dtype']}, seed {meta['seed']}"
    ]
    if meta.get("left_out"):
        few = meta["shots"] + meta["queries"]
        lines.append(f"{meta['left_out']} people left out: in the bank, or fewer than {few} items")
    lines += [f"  {sentence}" for sentence in verdict(comparison)]
    for line in lines:
        console.print(line, highlight=False, markup=False)


def table(comparison: Comparison) -> Table:
    """Return the table of a comparison: one row per method, the best value of a column in bold. Fits 80 columns."""
    made = Table(
        title=title_of(comparison),
        caption="Means over people, 95% intervals in brackets, the best of a column in bold. Differences are paired; "
        "better or worse: the interval excludes zero. "
        f"Worse off: NLL more than {WORSE:g} above that of {POOLED}; clearly: a person's own 95% interval lies above "
        "zero. Training: the time for all people together.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 0),
        show_edge=False,
    )
    columns = {"method": [Cell(name) for name in comparison.names]} | columns_of(comparison)
    for title, cells in columns.items():
        words = re.split("[ \n]", " ".join([title, *(f"{c.text} {c.mark} {c.note}" for c in cells)]))
        made.add_column(title, justify="left" if title == "method" else "right", min_width=max(map(len, words)))
    for row in zip(*columns.values()):
        made.add_row(*map(_styled, row))
    return made


def columns_of(comparison: Comparison) -> dict[str, list[Cell]]:
    """Return the columns of the table by their titles: one cell per method."""
    rows, first, measure = comparison.rows, comparison.primary, comparison.yardstick
    others = [metric for row in rows for metric in row.people if metric not in _HIDDEN]
    made = {_TITLES.get(m, m): _scores(comparison, m) for m in dict.fromkeys((first, *others, measure))}
    if POOLED in comparison.names:
        made[f"{measure} against\n{POOLED}"] = _differences(comparison, measure)
        if comparison.row(POOLED).nll is not None:
            made["people\nworse off"] = _worse(comparison)
    seconds, kept = [row.seconds for row in rows], [row.bytes_per_person for row in rows]
    made["training"] = _best([(Cell(_whole(human_seconds(s))), s) for s in seconds])
    made["kept\neach"] = _best([(Cell(_whole(human_bytes(b))), b) for b in kept])
    return made


def _scores(comparison: Comparison, metric: str) -> list[Cell]:
    scores = [comparison.score(name, metric) for name in comparison.names]
    noted = metric == comparison.primary
    cells = [(Cell(f"{s.mean:.3f}", _brackets(s) if noted else ""), s.mean) if s else _EMPTY for s in scores]
    return _best(cells, metric in BETTER_LOW)


def _differences(comparison: Comparison, metric: str) -> list[Cell]:
    cells: list[Valued] = []
    for name in comparison.names:
        if difference := comparison.difference(name, POOLED, metric):
            judgement = judge(metric, difference, comparison.independent)
            mark = "" if judgement == "unclear" else judgement
            cells.append((Cell(f"{difference.mean:+.3f}", _brackets(difference, "+"), mark), difference.mean))
        else:
            cells.append((Cell("baseline"), 0.0) if name == POOLED else _EMPTY)
    return _best(cells, metric in BETTER_LOW)


def _worse(comparison: Comparison) -> list[Cell]:
    cells: list[Valued] = []
    for name in comparison.names:
        share, clearly = comparison.worse_off(name, POOLED) or (None, None)
        note = "" if clearly is None else f"{clearly:.0%} clearly"
        cells.append(_EMPTY if share is None else (Cell(f"{share:.0%}", note), share))
    return _best(cells)


def _best(cells: Sequence[Valued], low: bool = True) -> list[Cell]:
    """Mark the cells with the lowest or the highest value."""
    best = (min if low else max)((value for _, value in cells if value is not None), default=None)
    return [replace(cell, best=value is not None and value == best) for cell, value in cells]


def _styled(cell: Cell) -> Text:
    made = Text.assemble((cell.text, "bold" if cell.best else ""))
    if cell.mark:
        made.append(f" {cell.mark}", style=_COLOURS[cell.mark])
    return made.append(f"\n{cell.note}", style="dim") if cell.note else made


def _whole(value: str) -> str:
    return value.replace(" ", "\N{NO-BREAK SPACE}")


def _brackets(interval: Interval, sign: str = "") -> str:
    return f"[{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
