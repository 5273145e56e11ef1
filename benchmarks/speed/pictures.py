"""Growth curves as pictures, SVG and PNG: log-log, every line named where it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mta.evaluation.reports import figures


def draw(more: Mapping[str, Any], folder: Path) -> list[Path]:
    """``growth-<curve>.svg`` and ``.png`` of what a row brings; nothing where it brings no curve.

    ``more``: curve (its name), x, x_label, series (label -> values over x), slopes (label -> exponent), and y_label if
    all series have one unit.
    """
    if "curve" not in more:
        return []
    picture = figures.Picture(f"growth with {more['x_label']}", partial(_curves, more=more))
    return picture.save(folder / f"growth-{more['curve']}")


def _curves(ax: Any, more: Mapping[str, Any]) -> None:
    x, slopes = more["x"], more.get("slopes", {})
    ends = []
    for colour, (label, y) in zip(figures.COLOURS * len(more["series"]), more["series"].items()):
        ax.plot(x[: len(y)], y, "o-", color=colour, markersize=4, linewidth=1.4)
        text = f"{label}, slope {slopes[label]:.2f}" if label in slopes else label
        ends.append((x[len(y) - 1], y[-1], text, colour))
    ax.set(xscale="log", yscale="log", xlabel=more["x_label"], ylabel=more.get("y_label", ""))
    ax.set_xticks(x, [f"{value:g}" for value in x])
    _plain_ticks(ax)
    ax.grid(color=figures.LINE, alpha=0.35, linewidth=0.6)
    _name(ax, ends)


def _plain_ticks(ax: Any) -> None:
    """1, 2, 5, 10, ... as plain numbers: a curve often stays within one power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    ax.minorticks_off()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _name(ax: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names right of where lines end, at least a line's height apart."""
    above = -1e9
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        place = ax.transData.transform((x, y))[1]
        wanted = max(place, above + 15 * ax.figure.dpi / 72)
        above = wanted
        lift = (wanted - place) * 72 / ax.figure.dpi
        ax.annotate(
            text, (x, y), (8, lift), textcoords="offset points", va="center", color=colour, annotation_clip=False
        )
