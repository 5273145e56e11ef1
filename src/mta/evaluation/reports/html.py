"""What a comparison says: a table, plain sentences, JSON, and one HTML page that needs nothing else.

Nobody's id appears in any of them: a few people are shown as person A, B and C, which are the comparison's first ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor

from mta.bank.bank import Bank
from mta.evaluation.metrics import BETTER_LOW
from mta.evaluation.reports import figures
from mta.evaluation.reports.figures import human_bytes, human_seconds
from mta.evaluation.reports.summary import (
    findings,
    headline,
    judge,
    names_of,
    people_in,
    queries_each,
    units_in,
    verdict,
    worse_off,
    yardstick,
)
from mta.evaluation.statistics import WORSE, Comparison, Interval
from mta.system.atomic import write_text

__all__ = ["Cell", "Column", "findings", "grid", "table", "to_json", "verdict", "write_html"]

_HIDDEN = {"RMSE", "NLL"}  # of the other metrics in the table: one repeats MAE, one has columns of its own
_TITLES = {"MAE (median)": "median\nMAE"}
_COLOURS = {"better": "green", "worse": "red"}
_FACTS = {
    "command": "Command",
    "seed": "Seed",
    "base": "Base model",
    "note": "About these weights",
    "data": "Data",
    "terms": "Terms of the data",
    "protocol": "Protocol",
    "method": "Method",
    "bank": "Bank",
    "date": "Date",
    "versions": "Versions",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """A value of the table, small print under it, and whether it is clearly better or worse than the reference."""

    text: str = "-"
    note: str = ""
    mark: str = ""
    best: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """A title and one cell per method."""

    title: str
    cells: list[Cell]


def table(comparison: Comparison, reference: str = "task LoRA") -> Table:
    """The comparison for a terminal: one row per method, the best value of a column in bold."""
    from rich import box

    columns = grid(comparison, reference)
    narrow: Any = {"padding": (0, 0, 0, 0), "show_edge": False}  # eighty columns must do: that is what a pipe gets
    title, caption = _title(comparison), _caption(reference)
    made = Table(title=title, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, **narrow)
    for title, cells in [
        ("method", [Cell(row.name) for row in comparison.rows]),
        *((c.title, c.cells) for c in columns),
    ]:
        words = re.split("[ \n]", " ".join([title, *(f"{c.text} {c.mark} {c.note}" for c in cells)]))
        made.add_column(title, justify="left" if title == "method" else "right", min_width=max(map(len, words)))
    for i, row in enumerate(comparison.rows):
        made.add_row(Text(row.name), *(_rich(column.cells[i]) for column in columns))
    return made


def grid(comparison: Comparison, reference: str) -> list[Column]:
    """The columns of the table, whatever it is shown on."""
    rows, first, measure = comparison.rows, comparison.primary, yardstick(comparison)
    others = dict.fromkeys(metric for row in rows for metric in row.people if metric not in {first, *_HIDDEN})
    made = [_scores(comparison, first, interval=True), *(_scores(comparison, metric) for metric in others)]
    if measure != first:
        made.append(_scores(comparison, measure))
    if reference in names_of(comparison):
        made.append(_differences(comparison, measure, reference))
        if comparison.row(reference).nll is not None:
            made.append(_worse(comparison, reference))
    seconds, kept = [row.seconds for row in rows], [row.bytes_per_person for row in rows]
    made.append(_column("training", [Cell(_whole(human_seconds(s))) for s in seconds], seconds))
    return [*made, _column("kept\neach", [Cell(_whole(human_bytes(b))) for b in kept], kept)]


def to_json(comparison: Comparison, against: Sequence[str] = ("task LoRA", "OPPU"), **meta: Any) -> dict[str, Any]:
    """Everything that was measured, as JSON values: means, intervals, paired differences, worse-off shares and costs.

    ``meta`` says what a reader must know: base, note, data, seed, command. Answers and people are left out.
    """
    others = [name for name in against if name in names_of(comparison)]
    rows = [
        {
            "name": row.name,
            "metrics": {metric: _interval(comparison.score(row.name, metric)) for metric in row.people},
            "differences": {
                other: {m: _interval(d) for m in row.people if (d := comparison.difference(row.name, other, m))}
                for other in others
                if other != row.name
            },
            "worse_off": {
                other: {"share": shares[0], "clearly": shares[1]}
                for other in others
                if other != row.name and (shares := worse_off(comparison, row.name, other))
            },
            "seconds": row.seconds,
            "bytes_per_person": row.bytes_per_person,
        }
        for row in comparison.rows
    ]
    counts = {"people": people_in(comparison), "queries_per_person": queries_each(comparison)}
    if comparison.groups and (independent := units_in(comparison)) < people_in(comparison):
        counts["independent_groups"] = independent
    task = {"task": comparison.task.name, "primary": comparison.primary}
    return {"meta": dict(meta), **task, **counts, "verdict": verdict(comparison), "methods": rows}


def write_html(
    path: str | Path,
    comparison: Comparison,
    bank: Bank,
    people_vectors: Tensor | None,
    questions: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
    *,
    name: str = "MTA",
    reference: str = "task LoRA",
    rival: str = "OPPU",
) -> None:
    """One HTML file with everything in it: no script, no request to anywhere, light and dark, wide and narrow.

    ``people_vectors`` (U, E) are the encodings of the comparison's people in its order, for the map; without them there
    is none. No time is written but ``meta["date"]``.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("mta.evaluation.reports", ".")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = pages.get_template("report.html.jinja").render(
        title=_title(comparison),
        headline=headline(comparison, name, reference),
        findings=findings(comparison, name, reference, rival),
        methods=names_of(comparison),
        columns=grid(comparison, reference),
        caption=_caption(reference),
        name=name,
        questions=questions,
        facts=_facts(bank, meta),
        **_figures(comparison, bank, people_vectors, name, reference),
    )
    write_text(Path(path), text)


def _figures(
    comparison: Comparison,
    bank: Bank,
    people_vectors: Tensor | None,
    name: str,
    reference: str,
) -> dict[str, Any]:
    metric, names = comparison.primary, names_of(comparison)
    merge = comparison.row(name).merge if name in names else None
    points = [
        figures.Point(row.name, score, row.bytes_per_person)
        for row in comparison.rows
        if (score := comparison.score(row.name, metric))
    ]
    return {
        "scatter": figures.score_against_bytes(points, metric, metric in BETTER_LOW, name, reference),
        "map": None if people_vectors is None else figures.anchor_map(bank.vectors, people_vectors, merge),
        "bars": figures.coefficient_bars(merge, bank.info.items) if merge else [],
    }


def _scores(comparison: Comparison, metric: str, interval: bool = False) -> Column:
    scores = [comparison.score(row.name, metric) for row in comparison.rows]
    cells = [Cell(f"{s.mean:.3f}", _brackets(s) if interval else "") if s else Cell() for s in scores]
    return _column(_TITLES.get(metric, metric), cells, [s.mean if s else None for s in scores], metric in BETTER_LOW)


def _differences(comparison: Comparison, metric: str, reference: str) -> Column:
    cells: list[Cell] = []
    values: list[float | None] = []
    for row in comparison.rows:
        difference = comparison.difference(row.name, reference, metric)
        values.append(difference.mean if difference else None)
        if row.name == reference:
            cells.append(Cell("baseline"))
        elif difference is None:
            cells.append(Cell())
        else:
            judgement = judge(metric, difference, units_in(comparison))
            mark = "" if judgement == "unclear" else judgement
            cells.append(Cell(f"{difference.mean:+.3f}", _brackets(difference, "+"), mark))
    return _column(f"{metric} against\n{reference}", cells, values, metric in BETTER_LOW)


def _worse(comparison: Comparison, reference: str) -> Column:
    names = names_of(comparison)
    shares = [None if name == reference else worse_off(comparison, name, reference) for name in names]
    notes = ["" if s is None or s[1] is None else f"{s[1]:.0%} clearly" for s in shares]
    cells = [Cell(f"{s[0]:.0%}", note) if s else Cell() for s, note in zip(shares, notes)]
    return _column("people\nworse off", cells, [s[0] if s else None for s in shares])


def _column(title: str, cells: Sequence[Cell], values: Sequence[float | None], low: bool = True) -> Column:
    known = [value for value in values if value is not None]
    best = (min if low else max)(known, default=None)
    return Column(title, [replace(c, best=v is not None and v == best) for c, v in zip(cells, values)])


def _rich(cell: Cell) -> Text:
    made = Text.assemble((cell.text, "bold" if cell.best else ""))
    if cell.mark:
        made.append(f" {cell.mark}", style=_COLOURS[cell.mark])
    return made.append(f"\n{cell.note}", style="dim") if cell.note else made


def _whole(value: str) -> str:
    return value.replace(" ", "\N{NO-BREAK SPACE}")


def _brackets(interval: Interval, sign: str = "") -> str:
    return f"[{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


def _interval(interval: Interval | None) -> dict[str, float] | None:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high} if interval else None


def _title(comparison: Comparison) -> str:
    queries = queries_each(comparison)
    each = f", {queries} questions each" if queries else ""
    people, independent = people_in(comparison), units_in(comparison)
    groups = f" in {independent} independent groups" if independent < people else ""
    return f"{comparison.task.name}: {people} people{groups}{each}"


def _caption(reference: str) -> str:
    return (
        "Means over people, 95% intervals in brackets, the best of a column in bold. Differences are paired; "
        "better and worse are said where the interval excludes zero. "
        f"Worse off: NLL more than {WORSE:g} above that of {reference}; clearly: its own 95% interval lies above zero. "
        "Training: the time for all people together."
    )


def _facts(bank: Bank, meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the page says about how it was made, known things first."""
    info = bank.info
    rank, candidates, pooled = info.run.bank.lora.rank, info.members.candidates, info.members.task
    about: dict[str, Any] = {
        "base": info.base,
        "note": info.base_note,
        "method": "Merge-then-Adapt (arXiv:2511.20072), protocol reconstructed",
        "bank": f"{len(bank)} anchors of rank {rank} out of {candidates} candidates, encoder {info.encoder}; "
        f"task LoRA from {pooled} other people",
        **meta,
    }
    ordered = dict.fromkeys([*_FACTS, *about])
    told = {key: _plain(about[key]) for key in ordered if about.get(key) not in (None, "")}
    return [(_FACTS.get(key, key.replace("_", " ").capitalize()), text) for key, text in told.items()]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        if any(isinstance(inner, Mapping | list | tuple) for inner in value.values()):
            return json.dumps(value, indent=2, ensure_ascii=False, default=str)
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(inner) for inner in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
