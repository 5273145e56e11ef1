"""Pictures of exhibits, SVG and PNG, from plain numbers. The same numbers give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mta.evaluation.reports.figures import human_bytes, write_labels
from mta.evaluation.statistics import Interval
from mta.system.atomic import written_aside
from mta.system.extras import require

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#333333")  # told apart by everybody
INK, LINE = "#333333", "#bbbbbb"
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "mta",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True, slots=True)
class Line:
    """One series: a value with its interval at each x."""

    label: str
    x: Sequence[float]
    y: Sequence[Interval]


def forest(path: Path, rows: Sequence[tuple[str, Interval]], label: str) -> None:
    """A method a line, its difference with its interval, and zero; what lies far out is told in numbers at the edge."""
    left, right = _inside([one for _, one in rows])

    def draw(ax: Any) -> None:
        for place, (_, one) in enumerate(rows):
            sure = one.high < 0 or one.low > 0
            colour = COLOURS[0] if sure and one.high < 0 else COLOURS[1] if sure else "#777777"
            if left <= one.mean <= right:
                ax.plot([one.low, one.high], [place, place], color=colour, linewidth=1.6)
                ax.plot(one.mean, place, "o", color=colour, markersize=5)
            else:
                _far_out(ax, place, one.mean, (left, right), colour)
        ax.axvline(0, color=LINE, linewidth=1)
        ax.set_yticks(range(len(rows)), [name for name, _ in rows])
        ax.set(xlim=(left, right), ylim=(len(rows) - 0.5, -0.5), xlabel=label)
        ax.tick_params(left=False)

    save(path, draw, (6.4, 0.6 + 0.27 * len(rows)))


def _far_out(ax: Any, place: float, value: float, ends: tuple[float, float], colour: str) -> None:
    """A value beyond an axis's ends, told in numbers at the nearer one."""
    beyond = value > ends[1]
    text = f"{value:+.2f} \u2192" if beyond else f"\u2190 {value:+.2f}"
    side = "right" if beyond else "left"
    ax.text(ends[beyond], place, text, ha=side, va="center", color=colour, size=9)


def lines(
    path: Path,
    series: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    level: Mapping[str, float] = {},
) -> None:
    """Values over x with their intervals; ``level`` are horizontal lines with names."""

    def draw(ax: Any) -> None:
        shift = 0.012 if log else 0.06  # so that intervals do not hide each other
        for n, line in enumerate(series):
            x = [v * (1 + shift * n) if log else v + shift * n for v in line.x]
            colour = COLOURS[n % len(COLOURS)]
            for at, one in zip(x, line.y):
                ax.plot([at, at], [one.low, one.high], color=colour, linewidth=1, alpha=0.5)
            ax.plot(x, [one.mean for one in line.y], "o-", color=colour, markersize=4, linewidth=1.5, label=line.label)
        for value in level.values():
            ax.axhline(value, color=INK, linewidth=1, dashes=(4, 3))
        places = sorted({v for line in series for v in line.x})
        if log:
            ax.set_xscale("log")
        ax.set_xticks(places, [f"{v:g}" for v in places])
        ax.minorticks_off()
        ax.set(xlabel=x_label, ylabel=y_label)
        ax.legend(frameon=False, fontsize=8.5, loc="best")
        _name_levels(ax, level)

    save(path, draw)


def curves(path: Path, runs: Mapping[str, Sequence[float]], y_label: str) -> None:
    """A loss at each step, of several runs over each other: faint as it was, and its mean over the tenth before."""

    def draw(ax: Any) -> None:
        for n, (name, values) in enumerate(runs.items()):
            colour, wide = COLOURS[n % len(COLOURS)], max(len(values) // 10, 1)
            means = [sum(values[max(i - wide + 1, 0) : i + 1]) / min(wide, i + 1) for i in range(len(values))]
            steps = range(1, len(values) + 1)
            if wide > 1:
                ax.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25)
            ax.plot(steps, means, color=colour, linewidth=1.6, label=f"{name}, {means[-1]:.3f} at the end")
            ax.plot(len(values), means[-1], "o", color=colour, markersize=4.5)  # where another line may hide it
        ax.set(xlabel="step", ylabel=y_label)
        ax.legend(frameon=False, fontsize=8.5, loc="best")

    save(path, draw)


def beside(path: Path, rows: Sequence[tuple[str, Sequence[Interval | None]]], runs: Sequence[str], label: str) -> None:
    """A method a line and a run a colour: differences with their intervals beside each other, and zero."""
    left, right = _inside([one for _, found in rows for one in found if one])

    def draw(ax: Any) -> None:
        for n, run in enumerate(runs):
            colour, shift = COLOURS[n % len(COLOURS)], 0.7 * ((n + 0.5) / len(runs) - 0.5)
            shown = [(place + shift, found[n]) for place, (_, found) in enumerate(rows)]
            inside = [(at, one) for at, one in shown if one and left <= one.mean <= right]
            for at, one in [(at, one) for at, one in shown if one and not left <= one.mean <= right]:
                _far_out(ax, at, one.mean, (left, right), colour)
            for at, one in inside:
                ax.plot([one.low, one.high], [at, at], color=colour, linewidth=1.4, alpha=0.7)
            ax.plot([one.mean for _, one in inside], [at for at, _ in inside], "o", color=colour, ms=5, label=run)
        ax.axvline(0, color=LINE, linewidth=1)
        ax.set_yticks(range(len(rows)), [name for name, _ in rows])
        ax.set(xlim=(left, right), ylim=(len(rows) - 0.5, -0.5), xlabel=label)
        ax.tick_params(left=False)
        ax.legend(frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)

    save(path, draw, (6.4, 0.9 + (0.15 + 0.17 * len(runs)) * len(rows)))


def _name_levels(ax: Any, level: Mapping[str, float]) -> None:
    """Names beside their lines, moved apart where lines are close together."""
    low, high = ax.get_ylim()
    room, last = 0.045 * (high - low), -math.inf
    for name, value in sorted(level.items(), key=lambda item: item[1]):
        last = max(value, last + room)
        ax.text(1.01, last, f"{name}  {value:+.3f}", transform=ax.get_yaxis_transform(), va="center", fontsize=8.5)


Points = Sequence[tuple[float, float]]


def growth(
    path: Path,
    curves: Mapping[str, tuple[Points, Points]],
    label: str,
    unit: Callable[[float], str],
    marked: Sequence[float],
) -> None:
    """Measured totals over people as dots and lines, their fitted continuations as dashes, both axes logarithmic.

    Where nothing was measured there are only dashes. ``marked`` are the totals that may be named at the axis.
    """

    def draw(ax: Any) -> None:
        for n, (name, (points, fitted)) in enumerate(curves.items()):
            colour = COLOURS[n % len(COLOURS)]
            if points:
                ax.plot(*zip(*points), "o-", color=colour, markersize=4, linewidth=1.5, label=f"{name}, measured")
            told = f"{name}, fitted line" if points else name
            ax.plot(*zip(*fitted), color=colour, linewidth=1.2, dashes=(4, 3), label=told)
        ax.set(xscale="log", yscale="log", xlabel="people", ylabel=label)
        low, high = ax.get_ylim()
        ticks = [tick for tick in marked if low <= tick <= high]
        ax.set_yticks(ticks, [unit(tick) for tick in ticks])
        people = [10**n for n in range(7)]
        ax.set_xticks(people, [f"{count:,}" for count in people])
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=8.5, loc="upper left")

    save(path, draw)


def scatter(path: Path, points: Sequence[tuple[str, float, Interval]], y_label: str) -> None:
    """Score with its interval over bytes kept per person; nothing kept has a place of its own on the left."""
    wide, high = 480.0, 300.0  # points of the axes, about: enough to keep labels apart
    xs = [max(kept, 1.0) for _, kept, _ in points]
    bottom, top = _inside([one for _, _, one in points])
    right = max(8.7, *(math.log10(x) + 1.7 for x in xs))

    def draw(ax: Any) -> None:
        colours = [COLOURS[0] if name.startswith("MTA") else "#777777" for name, _, _ in points]
        for x, colour, (_, _, one) in zip(xs, colours, points):
            ax.plot([x, x], [one.low, one.high], color=colour, linewidth=1, alpha=0.5)
            ax.plot(x, min(max(one.mean, bottom), top), "o", color=colour, markersize=5)
        ticks = [10.0**power for power in range(2, int(right), 2)]
        ax.set(xscale="log", xlim=(10**-0.5, 10**right), ylim=(bottom, top), xlabel="kept per person", ylabel=y_label)
        ax.set_xticks([1, *ticks], ["0", *(human_bytes(tick) for tick in ticks)])
        ax.minorticks_off()
        shown = [(x, min(max(one.mean, bottom), top)) for x, (_, _, one) in zip(xs, points)]
        spots = [((math.log10(x) + 0.5) / (right + 0.5) * wide, (y - bottom) / (top - bottom) * high) for x, y in shown]
        labels = [
            (name, colour if name.startswith("MTA") else INK, name == "MTA")
            for colour, (name, _, _) in zip(colours, points)
        ]
        write_labels(ax, shown, spots, labels, wide)

    save(path, draw, (7.6, 4.8))


def bars(path: Path, groups: Mapping[str, Mapping[str, float]], x_label: str, y_label: str, marked: str) -> None:
    """For each group its share of every label, side by side; ``marked`` is the true label."""

    def draw(ax: Any) -> None:
        labels = list(next(iter(groups.values())))
        width = 0.8 / len(groups)
        for n, (name, shares) in enumerate(groups.items()):
            x = [place + (n - (len(groups) - 1) / 2) * width for place in range(len(labels))]
            ax.bar(x, [shares[one] for one in labels], width, color=COLOURS[n % len(COLOURS)], label=name)
        ax.set_xticks(range(len(labels)), [f"{one} (true)" if one == marked else one for one in labels])
        ax.set(xlabel=x_label, ylabel=y_label)
        ax.legend(frameon=False, fontsize=8.5)

    save(path, draw, (6.4, 3.6))


def _inside(values: Sequence[Interval]) -> tuple[float, float]:
    """An axis on which most values can be told apart: what lies far out is cut."""
    means = sorted(one.mean for one in values)
    middle, spread = means[len(means) // 2], sorted(abs(m - means[len(means) // 2]) for m in means)
    reach = max(
        4 * spread[int(len(spread) * 0.6)],
        *(one.high - one.low for one in values if abs(one.mean - middle) <= spread[len(spread) // 2]),
    )
    low = max(min(one.low for one in values), middle - reach)
    high = min(max(one.high for one in values), middle + reach)
    pad = 0.05 * (high - low) or 1.0
    return low - pad, high + pad


def save(path: Path, draw: Callable[[Any], None], size: tuple[float, float] = (6.4, 4.0)) -> list[Path]:
    """What ``draw`` puts on axes, as ``path``.svg and ``path``.png."""
    require("eval", "matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        draw(figure.add_subplot())
        paths = [path.with_suffix(f".{ending}") for ending in ("svg", "png")]
        for one, undated in zip(paths, ({"Date": None}, {"Software": None})):
            with written_aside(one) as aside:
                figure.savefig(aside, format=one.suffix[1:], dpi=160, metadata=undated)
    return paths
