"""All figures of reports, drawn with matplotlib from plain numbers. The same numbers give the same bytes.

Each function returns a ``Picture``, which is saved as SVG and PNG or embedded in a page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mta.evaluation.metrics import BETTER_LOW
from mta.evaluation.reports.summary import OURS
from mta.evaluation.statistics import Interval
from mta.system.atomic import replacing
from mta.system.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#333333")  # for color-blind readers too
INK, MUTED, LINE = "#333333", "#777777", "#bbbbbb"
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
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8.5}


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure: its description for screen readers, how to draw it on matplotlib axes, and its size in inches."""

    alt: str
    draw: Callable[[Any], None]
    size: tuple[float, float] = (6.4, 4.0)

    def save(self, path: Path) -> list[Path]:
        """Write ``path``.svg and ``path``.png. Returns their paths."""
        paths = [path.with_name(f"{path.name}.{ending}") for ending in ("svg", "png")]
        with self._drawn() as figure:
            for one, undated in zip(paths, ({"Date": None}, {"Software": None})):
                with replacing(one) as temporary:
                    figure.savefig(temporary, format=one.suffix[1:], dpi=160, metadata=undated)
        return paths

    def data_uri(self) -> str:
        """Return the SVG as a ``data:`` address, so that a page needs no file beside it."""
        out = io.BytesIO()
        with self._drawn() as figure:
            figure.savefig(out, format="svg", metadata={"Date": None})
        return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()

    @contextmanager
    def _drawn(self) -> Iterator[Figure]:
        require("eval", "matplotlib")
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context(_STYLE):
            figure = Figure(figsize=self.size, layout="constrained", facecolor="white")
            self.draw(figure.add_subplot())
            yield figure


def gains(rows: Mapping[str, Sequence[Interval]], metrics: Sequence[str]) -> Picture:
    """Each method's difference to everybody's model (zero) in some metrics, side by side; better is to the right."""

    def draw(ax: Any) -> None:
        ax.axis("off")
        for n, metric in enumerate(metrics):
            sign, width = -1 if metric in BETTER_LOW else 1, 1 / len(metrics)
            panel = ax.inset_axes((n * width, 0, 0.9 * width, 1))
            for place, (name, known) in enumerate(rows.items()):
                mean, ends = 0.0 + sign * known[n].mean, sorted((sign * known[n].low, sign * known[n].high))
                colour = COLOURS[0] if name.startswith(f"{OURS}\n") else MUTED
                panel.plot(ends, [place, place], color=colour, linewidth=2)
                panel.plot(mean, place, "o", color=colour, markersize=6)
                panel.annotate(
                    f"{mean:+.3f}", (mean, place), (0, 7), textcoords="offset points", ha="center", fontsize=8
                )
            panel.axvline(0, color=INK, linewidth=1)
            panel.set_yticks(range(len(rows)), list(rows) if n == 0 else [""] * len(rows), fontsize=8.5)
            panel.set(ylim=(len(rows) - 0.4, -0.7), xlabel=f"{metric}: better to the right")
            panel.locator_params(axis="x", nbins=4)
            panel.tick_params(left=False)

    said = listed(
        f"{name.splitlines()[0]} {' and '.join(f'{m} {one.mean:+.3f}' for m, one in zip(metrics, known))}"
        for name, known in rows.items()
    )
    return Picture(f"Differences to everybody's model: {said}.", draw, (8.4, 0.8 + 0.55 * len(rows)))


def shortened(text: str, most: int = 38) -> str:
    """Return a text in one line of at most ``most`` characters."""
    words = " ".join(text.split())
    return words if len(words) <= most else f"{words[: most - 1]}…"


def predictions(
    who: str, asked: Sequence[str], golds: Sequence[str], labels: Sequence[str], means: Mapping[str, Sequence[float]]
) -> Picture:
    """A person's true answers, and what several models expect, question by question. Labels are numbers."""

    def draw(ax: Any) -> None:
        places = range(len(asked))
        ax.scatter([float(gold) for gold in golds], places, s=110, facecolors="none", edgecolors=INK, label="true")
        for n, (name, values) in enumerate(means.items()):
            colour = (MUTED, *COLOURS)[n]
            ax.scatter(values, places, s=28, color=colour, label=name, marker="os^Dv"[n % 5])
        ax.set_yticks(places, [shortened(question, 48) for question in asked], fontsize=8.5)
        numbers = [float(label) for label in labels]
        ax.set(xlim=(min(numbers) - 0.4, max(numbers) + 0.4), ylim=(len(asked) - 0.4, -0.6), title=who)
        ax.set_xticks(numbers, labels)
        ax.tick_params(left=False)
        ax.grid(axis="y", color=LINE, linewidth=0.4)
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), **LEGEND)

    errors = listed(
        f"{name} {sum(abs(m - float(g)) for m, g in zip(values, golds)) / len(golds):.2f}"
        for name, values in means.items()
    )
    return Picture(
        f"Answers of {who}: true, and as models expect them. Mean errors: {errors}.",
        draw,
        (7.6, 0.9 + 0.3 * len(asked)),
    )


def listed(words: Iterable[str]) -> str:
    """Return words in one line of text."""
    return ", ".join(words) or "none"
