"""The table of all rows: for the terminal by rich, for the page on performance as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.speed.timing import Row

_COLOURS = {"met": "green", "missed": "red"}
_STEPS = ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))  # from, unit, letter
_COLUMNS = ("row", "ours", "peer", "ratio", "spread", "target", "verdict")


def number(value: float) -> str:
    """Three digits as people read them: 0.0123, 4.56, 78.9, 1230, 45.6k, 832G."""
    for least, unit, letter in _STEPS:
        if abs(value) >= least:
            return f"{_three(value / unit)}{letter}"
    return _three(value)


def _three(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cells(row: Row) -> tuple[str, ...]:
    """What stands in the columns of one row."""
    target = "" if row.target is None else f"{row.target:g}x"
    if row.skipped or not row.rates:
        return (row.name, row.ours, row.peer, "", "", target, row.verdict)
    low, high = row.spread
    middle = sorted(row.rates)[len(row.rates) // 2], sorted(row.peer_rates)[len(row.peer_rates) // 2]
    ours, peer = (f"{who}: {number(rate)} {row.unit}".strip() for who, rate in zip((row.ours, row.peer), middle))
    return (row.name, ours, peer, f"{row.ratio:.2f}x", f"{low:.2f} to {high:.2f}", target, row.verdict)


def table(rows: Sequence[Row]) -> Table:
    """All rows, verdicts in colour."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in _COLUMNS:
        shown.add_column(column, justify="right" if column in ("ratio", "target") else "left", overflow="fold")
    for row in rows:
        verdict = row.verdict
        style = _COLOURS.get(verdict, "dim" if row.skipped else "")
        *first, last = cells(row)
        shown.add_row(*first, f"[{style}]{last}[/]" if style else last)
    return shown


def show(rows: Sequence[Row], console: Console) -> None:
    """The table, what was compared, and the notes."""
    console.print(table(rows))
    for row in rows:
        if note := remark(row):
            console.print(f"[dim]{row.name}: {note}[/]", highlight=False)


def line(row: Row) -> str:
    """One row as a line, as soon as it is there."""
    name, ours, peer, ratio, spread, target, verdict = cells(row)
    if not row.rates:
        return f"{name}: {verdict or remark(row) or 'measured'}"
    wanted = f", target {target} {verdict}" if target else ""
    return f"{name}: {ratio} ({spread}){wanted}; {ours}; {peer}"


def remark(row: Row) -> str:
    """What else there is to say: how far results were apart, and the note."""
    parts = []
    if row.difference is not None:
        parts.append(f"{row.compared or 'results'} differ by {row.difference:.2g} at most")
    if row.note:
        parts.append(row.note)
    return "; ".join(parts)


def markdown(rows: Sequence[Row], processor: str, cores: int) -> str:
    """The table in Markdown; rows that were skipped are left out."""
    head = ("", "ours", "peer", "ratio", "target")
    lines = [f"Measured on {processor} with {cores} cores.", "", _line(head), _line(("---",) * len(head))]
    for row in rows:
        if row.skipped or not row.rates:
            continue
        name, ours, peer, ratio, _, target, verdict = cells(row)
        lines.append(_line((name, ours, peer, f"**{ratio}**", f"{target} {verdict}".strip())))
    return "\n".join(lines) + "\n"


def _line(parts: Sequence[str]) -> str:
    return "| " + " | ".join(part.replace("|", "\\|") for part in parts) + " |"
