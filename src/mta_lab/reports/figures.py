"""Figures of experiments and runs, as plain numbers become ``Picture`` of mta.evaluation.reports.figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mta.evaluation.reports.figures import COLOURS, INK, LEGEND, LINE, MUTED, Picture, listed
from mta.evaluation.statistics import Interval
from mta.system.units import human_bytes, human_seconds

Measured = tuple[Sequence[tuple[float, float]], float, float]
"""Points (people, total) of a growing total, and the line through them: its start, and its growth per person."""
_PEOPLE = [10 ** (n / 4) for n in range(25)]  # numbers of people for fitted lines, up to a million
_TICKS: Mapping[Callable[[float], str], Sequence[float]] = {
    human_seconds: (1, 60, 600, 3600, 36_000, 360_000, 3_600_000, 36_000_000),
    human_bytes: [10**n for n in range(3, 16, 2)],
}


def forest(rows: Sequence[tuple[str, Interval]], label: str) -> Picture:
    """Forest plot: one line per method with its 95% interval, and zero. Outliers are numbers at the edge."""
    left, right = inside([one for _, one in rows])

    def draw(ax: Any) -> None:
        for place, (_, one) in enumerate(rows):
            colour = COLOURS[0] if one.high < 0 else COLOURS[1] if one.low > 0 else MUTED
            if left <= one.mean <= right:
                ax.plot([one.low, one.high], [place, place], color=colour, linewidth=1.6)
                ax.plot(one.mean, place, "o", color=colour, markersize=5)
            elif one.mean > right:
                ax.text(right, place, f"{one.mean:+.2f} →", ha="right", va="center", color=colour, size=9)
            else:
                ax.text(left, place, f"← {one.mean:+.2f}", ha="left", va="center", color=colour, size=9)
        ax.axvline(0, color=LINE, linewidth=1)
        ax.set_yticks(range(len(rows)), [name for name, _ in rows])
        ax.set(xlim=(left, right), ylim=(len(rows) - 0.5, -0.5), xlabel=label)
        ax.tick_params(left=False)

    alt = f"{label}: {listed(f'{name} {one.mean:+.3f}' for name, one in rows)}."
    return Picture(alt, draw, (6.4, 0.6 + 0.27 * len(rows)))


def lines(
    series: Mapping[str, Mapping[float, Interval]],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    level: Mapping[str, float] = {},
) -> Picture:
    """Values over x with their intervals, one line per series. ``level`` are named horizontal lines."""

    def draw(ax: Any) -> None:
        shift = 0.012 if log else 0.06  # so that intervals do not hide each other
        for n, (label, points) in enumerate(series.items()):
            x = [v * (1 + shift * n) if log else v + shift * n for v in points]
            colour = COLOURS[n % len(COLOURS)]
            for at, one in zip(x, points.values()):
                ax.plot([at, at], [one.low, one.high], color=colour, linewidth=1, alpha=0.5)
            means = [one.mean for one in points.values()]
            ax.plot(x, means, "o-", color=colour, markersize=4, linewidth=1.5, label=label)
        for value in level.values():
            ax.axhline(value, color=INK, linewidth=1, dashes=(4, 3))
        places = sorted({v for points in series.values() for v in points})
        if log:
            ax.set_xscale("log")
        ax.set_xticks(places, [f"{v:g}" for v in places])
        ax.minorticks_off()
        ax.set(xlabel=x_label, ylabel=y_label)
        ax.legend(loc="best", **LEGEND)
        _name_levels(ax, level)

    return Picture(f"{y_label} over {x_label}: {listed(series)}.", draw)


def inside(values: Sequence[Interval]) -> tuple[float, float]:
    """Return the ends of an axis on which most values can be distinguished. Outliers are cut."""
    means = sorted(one.mean for one in values)
    middle = means[len(means) // 2]
    spread = sorted(abs(mean - middle) for mean in means)
    reach = max(
        4 * spread[int(len(spread) * 0.6)],
        *(one.high - one.low for one in values if abs(one.mean - middle) <= spread[len(spread) // 2]),
    )
    low = max(min(one.low for one in values), middle - reach)
    high = min(max(one.high for one in values), middle + reach)
    pad = 0.05 * (high - low) or 1.0
    return low - pad, high + pad


def _name_levels(ax: Any, level: Mapping[str, float]) -> None:
    """Write names beside their lines, moved apart where lines are close together."""
    low, high = ax.get_ylim()
    room, last = 0.045 * (high - low), -math.inf
    for name, value in sorted(level.items(), key=lambda item: item[1]):
        last = max(value, last + room)
        ax.text(1.01, last, f"{name}  {value:+.3f}", transform=ax.get_yaxis_transform(), va="center", fontsize=8.5)


def curves(losses: Mapping[str, Sequence[float]]) -> Picture:
    """Loss curves of a run's stages: each step faint, and the mean over the last tenth of the steps."""

    def draw(ax: Any) -> None:
        for n, (name, values) in enumerate(losses.items()):
            colour, wide = COLOURS[n % len(COLOURS)], max(len(values) // 10, 1)
            means = [sum(values[max(i - wide + 1, 0) : i + 1]) / min(wide, i + 1) for i in range(len(values))]
            steps = range(1, len(values) + 1)
            if wide > 1:
                ax.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25)
            ax.plot(steps, means, color=colour, linewidth=1.6, label=f"{name}, {means[-1]:.3f} at the end")
        ax.set(xlabel="step", ylabel="loss (nats per target token)")
        ax.legend(loc="best", **LEGEND)

    return Picture(f"Loss over steps: {listed(losses)}.", draw)


def growth(curves: Mapping[str, Measured], label: str, unit: Callable[[float], str]) -> Picture:
    """Totals over the number of people, both axes logarithmic: measured points solid, fitted lines dashed.

    ``unit`` is ``human_seconds`` or ``human_bytes``.
    """

    def draw(ax: Any) -> None:
        for n, (name, (points, start, each)) in enumerate(curves.items()):
            colour = COLOURS[n % len(COLOURS)]
            if points:
                ax.plot(*zip(*points), "o-", color=colour, markersize=4, linewidth=1.5, label=f"{name}, measured")
            called = f"{name}, fitted line" if points else name
            fitted = [start + people * each for people in _PEOPLE]
            ax.plot(_PEOPLE, fitted, color=colour, linewidth=1.2, dashes=(4, 3), label=called)
        ax.set(xscale="log", yscale="log", xlabel="people", ylabel=label)
        low, high = ax.get_ylim()
        shown = [tick for tick in _TICKS[unit] if low <= tick <= high]
        ax.set_yticks(shown, [unit(tick) for tick in shown])
        people = [10**n for n in range(7)]
        ax.set_xticks(people, [f"{count:,}" for count in people])
        ax.minorticks_off()
        ax.legend(loc="upper left", **LEGEND)

    return Picture(f"{label} over the number of people: {listed(curves)}.", draw)
