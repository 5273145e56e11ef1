"""The report's figures: inline SVG that takes its colours from the page, so that they follow light and dark.

Drawn by matplotlib's SVG backend through its objects, never through pyplot; the same numbers give the same bytes.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mta.evaluation.run import Interval
from mta.fuse import Merge

# Stand-ins that become CSS variables. Blue, vermillion and green are told apart by colour-blind readers as well.
INK, MUTED, LINE, PAPER = "#010101", "#020202", "#030303", "#040404"
ACCENTS = ("#050505", "#060606", "#070707")
_VARIABLES = dict(zip((INK, MUTED, LINE, PAPER, *ACCENTS), ("ink", "muted", "line", "paper", "blue", "red", "green")))
_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read out, searched, and set in the page's own font
    "svg.hashsalt": "mta",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
}
_WIDTH = 440.0  # points: narrow, so that letters can still be read on a phone


@dataclass(frozen=True, slots=True)
class Point:
    """A method in the scatter: its score and what it keeps of one person."""

    name: str
    score: Interval
    bytes: float


def letter(person: int) -> str:
    """How an example person is called: person A, person B, ..."""
    return f"person {chr(ord('A') + person)}"


def human_bytes(count: float) -> str:
    """A size as people read it: 0, 61 B, 4.6 kB, 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            return "0" if count == 0 else f"{count:.{0 if unit == 'B' or count >= 99.5 else 1}f} {unit}"
        count /= 1000
    raise AssertionError


def human_seconds(seconds: float) -> str:
    """A duration as people read it: 0, 0.4 s, 12 s, 3.5 min, 2.1 h."""
    if seconds < 99.5:
        return "0" if seconds == 0 else f"{seconds:.{0 if seconds >= 9.95 else 1}f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def anchor_map(anchors: Tensor, people: Tensor, merge: Merge | None = None, examples: int = 3, lines: int = 3) -> str:
    """Anchors (N, E) and people (U, E) on the two directions they differ most in, with a few people's top anchors.

    ``merge`` belongs to the same people in the same order; lines are as thick as its coefficients.
    """
    from sklearn.decomposition import PCA

    pca = PCA(2, svd_solver="full")
    places = pca.fit_transform(torch.cat([anchors.double().cpu(), people.double().cpu()]).numpy())
    ours, theirs = places[: len(anchors)], places[len(anchors) :]
    shown = range(min(examples, len(people)))

    def draw(figure: Any) -> None:
        ax = figure.add_subplot()
        ax.set_aspect("equal", adjustable="datalim")
        ax.margins(0.08)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.scatter(*theirs.T, s=9, color=MUTED, alpha=0.45, linewidths=0)
        ax.scatter(*ours.T, s=170, facecolor=PAPER, edgecolor=MUTED, linewidths=0.9, zorder=3)
        for n, (x, y) in enumerate(ours):
            ax.text(x, y, str(n), size=8, ha="center", va="center_baseline", zorder=4)
        for person in shown:
            colour, here = ACCENTS[person % 3], theirs[person]
            for anchor, w in _top(merge, person, lines):
                ax.plot(*zip(here, ours[anchor]), color=colour, linewidth=1 + 3 * min(abs(w), 1), alpha=0.7, zorder=2)
            ax.scatter(*here, s=60, color=colour, edgecolor=PAPER, zorder=5)
            ax.annotate(letter(person), here, (0, 8), textcoords="offset points", ha="center", weight="bold", zorder=6)
            ax.texts[-1].set_color(colour)

    told = [f"{letter(p)} leans on {_list(f'anchor {n}' for n, _ in _top(merge, p, lines))}" for p in shown if merge]
    share = f"{pca.explained_variance_ratio_.sum():.0%} of the spread is visible"
    alt = f"Map of {len(anchors)} numbered anchors and {len(people)} people in two dimensions; {share}."
    return _drawn("map", " ".join([alt, *(f"{text}." for text in told)]), 340, draw)


def coefficient_bars(merge: Merge, items: Sequence[int] = (), examples: int = 3, most: int = 5) -> str:
    """The strongest coefficients of the first few people; what is left to the pooled model gets a bar of its own.

    ``items`` are the history lengths of the anchors, for their labels.
    """
    groups = [_bars(merge, person, items, most) for person in range(min(examples, len(merge.ids)))]
    top = max([1e-9, *(abs(w) for bars in groups for _, w, _ in bars)])

    def draw(figure: Any) -> None:
        ax = figure.add_subplot()
        y = 0.0
        for person, bars in enumerate(groups):
            ax.text(0, y, letter(person), weight="bold", color=ACCENTS[person % 3], va="center")
            for label, w, ours in bars:
                y += 1
                ax.barh(y, w, 0.62, color=ACCENTS[person % 3] if ours else LINE)
                ax.text(-0.02 * top if w >= 0 else 0.02 * top, y, label, ha="right" if w >= 0 else "left", va="center")
                ax.text(w + math.copysign(0.02 * top, w), y, f"{w:.2f}", va="center", color=MUTED)
                ax.texts[-1].set_horizontalalignment("left" if w >= 0 else "right")
            y += 1.6
        ax.set(xlim=(min(-0.85 * top, *(1.2 * w for b in groups for _, w, _ in b)), 1.15 * top), ylim=(y - 0.9, -0.6))
        ax.axvline(0, color=LINE, linewidth=1)
        ax.axis("off")

    told = [f"{letter(p)}: " + _list(f"{label} {w:.2f}" for label, w, _ in bars) for p, bars in enumerate(groups)]
    rows = sum(len(bars) + 1.6 for bars in groups)
    return _drawn("bars", "Coefficients. " + "; ".join(told) + ".", 17 * rows + 10, draw)


def score_against_bytes(points: Sequence[Point], metric: str, low: bool, name: str, reference: str) -> str:
    """Every method's score with its interval over the bytes it keeps per person; nothing kept has a place of its own.

    A score far off the others is drawn at the edge with its value, so that the others can be told apart.
    """
    powers = [math.log10(p.bytes) for p in points if p.bytes > 0]
    left, right = (math.floor(min(powers)), math.ceil(max(powers))) if powers else (0, 1)
    zero = left - 1.0
    xs = [math.log10(p.bytes) if p.bytes > 0 else zero for p in points]
    bottom, top = _range([p.score for p in points], low)

    def draw(figure: Any) -> None:
        ax = figure.add_subplot()
        ax.axvspan(zero - 0.4, zero + 0.4, color=LINE, alpha=0.35, linewidth=0)
        for p in points:
            if p.name == reference:
                ax.axhline(p.score.mean, color=MUTED, linewidth=0.8, dashes=(4, 4))
        for p, x in zip(points, xs):
            colour = ACCENTS[0] if p.name == name else INK if p.name == reference else MUTED
            y = min(max(p.score.mean, bottom), top)
            marker = "o" if y == p.score.mean else "^" if y == top else "v"
            if y == p.score.mean:
                ax.plot([x, x], [max(p.score.low, bottom), min(p.score.high, top)], color=colour, linewidth=1.4)
            ax.plot(x, y, marker, color=colour, markersize=8 if p.name == name else 6)
        _label(ax, points, xs, (bottom, top), name)
        pad = 0.06 * (top - bottom)
        ax.set(xlim=(zero - 0.5, right + 0.34 * (right - zero)), ylim=(bottom - pad, top + pad))
        ticks = range(left, right + 1, 1 if right - left < 6 else 2)
        ax.set_xticks([zero, *ticks], ["0", *(human_bytes(10**n) for n in ticks)])
        ax.set(xlabel="kept per person", ylabel=f"{metric}, {'lower' if low else 'higher'} is better")

    told = _list(f"{p.name} {p.score.mean:.3f} with {human_bytes(p.bytes)}" for p in points)
    return _drawn("scatter", f"{metric} against bytes kept per person: {told}.", 320, draw)


def _label(ax: Any, points: Sequence[Point], xs: Sequence[float], limits: tuple[float, float], name: str) -> None:
    """Names beside the points, pushed apart where they would cover each other."""
    bottom, top = limits
    heights = [240 * (min(max(p.score.mean, bottom), top) - bottom) / (top - bottom) for p in points]
    placed: list[tuple[float, float]] = []
    reach = (max(xs) - min(xs) or 1.0) * 0.3
    for i in sorted(range(len(points)), key=lambda i: heights[i]):
        near = [h for x, h in placed if abs(x - xs[i]) < reach]
        height = max([heights[i], *(h + 13 for h in near)])
        placed.append((xs[i], height))
        point, at = points[i], min(max(points[i].score.mean, bottom), top)
        text = point.name if at == point.score.mean else f"{point.name} ({point.score.mean:.2f})"
        ours = point.name == name
        ax.annotate(
            text,
            (xs[i], at),
            (9, height - heights[i]),
            textcoords="offset points",
            va="center_baseline",
            weight="bold" if ours else "normal",
            color=ACCENTS[0] if ours else INK,
        )


def _range(scores: Sequence[Interval], low: bool) -> tuple[float, float]:
    best = min(s.mean for s in scores) if low else max(s.mean for s in scores)
    far = [abs(s.mean - best) for s in scores]
    reach = 4 * sorted(far)[len(far) // 2] or max(far)
    inside = [s for s, distance in zip(scores, far) if distance <= reach]
    bottom, top = min(s.low for s in inside), max(s.high for s in inside)
    return (bottom, top) if top > bottom else (bottom - 0.5, top + 0.5)


def _top(merge: Merge | None, person: int, most: int) -> list[tuple[int, float]]:
    if merge is None:
        return []
    w = merge.w[person].double()
    strongest = w.abs().argsort(descending=True, stable=True)[:most].tolist()
    return [(int(merge.ids[person, k]), float(w[k])) for k in strongest if abs(w[k]) >= 0.005]


def _bars(merge: Merge, person: int, items: Sequence[int], most: int) -> list[tuple[str, float, bool]]:
    """Label, coefficient, and whether it is an anchor's."""
    top = _top(merge, person, most)
    named = [(f"anchor {n}" + (f" ({items[n]} items)" if items else ""), w, True) for n, w in top]
    total = float(merge.w[person].double().sum())
    if merge.w.shape[1] > len(top) and abs(rest := total - sum(w for _, w in top)) >= 0.005:
        named.append((f"{merge.w.shape[1] - len(top)} other anchors", rest, True))
    # Coefficients that leave something are those of a policy with a null anchor: it goes to the pooled model.
    return [*named, ("pooled model alone", 1 - total, False)] if 0.005 <= 1 - total <= 1 else named


def _list(words: Any) -> str:
    return ", ".join(words) or "none"


def _drawn(name: str, alt: str, height: float, draw: Callable[[Any], None]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), name, alt)


def _inline(svg: str, name: str, alt: str) -> str:
    """A figure as part of a page: no XML head, ids of its own, colours of the page, a text for those who cannot see."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]*)"', svg)
    head = f'<svg class="figure" role="img" aria-label="{html.escape(alt)}" viewBox="{box and box[1]}">'
    svg = head + svg[svg.index(">") + 1 :]
    for old, new in (('id="', f'id="{name}-'), ('xlink:href="#', f'href="#{name}-'), ("url(#", f"url(#{name}-")):
        svg = svg.replace(old, new)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var(--{variable})")
    return svg
