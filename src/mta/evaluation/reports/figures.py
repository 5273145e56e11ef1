"""The report's figures: inline SVG that takes its colours from the page, so that they follow light and dark.

Drawn by matplotlib's SVG backend through its objects, never through pyplot; the same numbers give the same bytes.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mta.evaluation.statistics import Interval
from mta.personalize.merge import Merge
from mta.system.extras import require

# Stand-ins that become CSS variables. Blue, vermillion and green are told apart by colour-blind readers as well.
INK, MUTED, LINE, PAPER = "#010101", "#020202", "#030303", "#040404"
ACCENTS = ("#050505", "#060606", "#070707")
_VARIABLES = dict(zip((INK, MUTED, LINE, PAPER, *ACCENTS), ("ink", "muted", "line", "paper", "blue", "red", "green")))
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read out, searched, and set in the page's own font
    "svg.hashsalt": "mta",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 12,
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
_Box = tuple[float, float, float, float]  # left, bottom, right, top
_WIDTH = 400.0  # points: narrow, so that letters can still be read on a phone


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
    """A size as people read it: 0, 61 B, 4.6 kB, 10 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    digits = 0 if unit == "B" or count >= 9.95 else 1
    return "0" if count == 0 else f"{count:.{digits}f}".removesuffix(".0") + f" {unit}"


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
    wide, high = (float(side) or 1.0 for side in places.max(0) - places.min(0))
    height = min(max(_WIDTH * high / wide, 0.65 * _WIDTH), _WIDTH)
    tops = [_top(merge, person, lines) for person in shown]

    def draw(figure: Any) -> None:
        ax = figure.add_subplot()
        ax.set_aspect("equal", adjustable="datalim")
        ax.margins(0.06)
        ax.axis("off")
        ax.scatter(*theirs.T, s=10, color=MUTED, alpha=0.5, linewidths=0)
        ax.scatter(*ours.T, s=190, facecolor=PAPER, edgecolor=MUTED, linewidths=0.9, zorder=3)
        for n, (x, y) in enumerate(ours):
            ax.text(x, y, str(n), size=8.5, ha="center", va="center_baseline", zorder=4)
        for person, top in zip(shown, tops):
            for anchor, w in top:
                path = zip(theirs[person], ours[anchor])
                ax.plot(*path, color=ACCENTS[person % 3], linewidth=1 + 4 * min(abs(w), 1), alpha=0.75, zorder=2)
            ax.scatter(*theirs[person], s=70, color=ACCENTS[person % 3], edgecolor=PAPER, zorder=5)
        spots = [tuple((theirs[p] - places.min(0)) / wide * _WIDTH) for p in shown]
        write_labels(ax, theirs, spots, [(letter(p), ACCENTS[p % 3], True) for p in shown], _WIDTH)

    told = [f" {letter(p)} leans on {_list(f'anchor {n}' for n, _ in top)}." for p, top in zip(shown, tops) if merge]
    share = f"{pca.explained_variance_ratio_.sum():.0%} of the spread is visible"
    alt = f"Map of {len(anchors)} numbered anchors and {len(people)} people in two dimensions; {share}."
    return _drawn("map", alt + "".join(told), _WIDTH, height, draw)


def coefficient_bars(merge: Merge, items: Sequence[int] = (), examples: int = 3, most: int = 5) -> list[str]:
    """The strongest coefficients of the first few people, a drawing each, all to the same scale.

    What is left to the pooled model gets a bar too. ``items`` are the history lengths of the anchors, for their labels.
    """
    groups = [_bars(merge, person, items, most) for person in range(min(examples, len(merge.ids)))]
    top = max([1e-9, *(abs(w) for bars in groups for _, w, _ in bars)])
    least = min([-1.15 * top, *(1.25 * w for bars in groups for _, w, _ in bars)])
    rows = max(len(bars) for bars in groups)

    def draw(figure: Any, person: int) -> None:
        ax = figure.add_subplot()
        for y, (label, w, ours) in enumerate(groups[person]):
            left, pad = w < 0, 0.03 * top
            ax.barh(y, w, 0.62, color=ACCENTS[person % 3] if ours else MUTED, alpha=1.0 if ours else 0.45)
            ax.text(pad if left else -pad, y, label, ha="left" if left else "right", va="center_baseline")
            ax.text(w + math.copysign(pad, w), y, f"{w:.2f}", ha="right" if left else "left", va="center_baseline")
        ax.axvline(0, color=LINE, linewidth=1)
        ax.set(xlim=(least, 1.25 * top), ylim=(rows - 0.4, -0.6))
        ax.axis("off")

    made = []
    for person, bars in enumerate(groups):
        alt = f"Coefficients of {letter(person)}: {_list(f'{label} {w:.2f}' for label, w, _ in bars)}."
        made.append(_drawn(f"bars{person}", alt, 320, 20 * rows + 8, partial(draw, person=person)))
    return made


def score_against_bytes(points: Sequence[Point], metric: str, low: bool, name: str, reference: str) -> str:
    """Every method's score with its interval over the bytes it keeps per person; nothing kept has a place of its own.

    A score far off the others is drawn at the edge with its value, so that the others can be told apart.
    """
    powers = [math.log10(p.bytes) for p in points if p.bytes > 0]
    left, right = (math.floor(min(powers)), math.ceil(max(powers))) if powers else (0, 1)
    zero = left - 1.0
    xs = [math.log10(p.bytes) if p.bytes > 0 else zero for p in points]
    bottom, top = _range([p.score for p in points], low)
    ys = [min(max(p.score.mean, bottom), top) for p in points]
    colours = [ACCENTS[0] if p.name == name else INK if p.name == reference else MUTED for p in points]
    height = 320.0

    def draw(figure: Any) -> None:
        ax = figure.add_subplot()
        ax.axvspan(zero - 0.4, zero + 0.4, color=LINE, alpha=0.35, linewidth=0)
        for p, x, y, colour in zip(points, xs, ys, colours):
            if p.name == reference:
                ax.axhline(y, color=MUTED, linewidth=0.8, dashes=(4, 4), zorder=1)
            if y == p.score.mean:
                ax.plot([x, x], [max(p.score.low, bottom), min(p.score.high, top)], color=colour, linewidth=1.3)
            marker = "o" if y == p.score.mean else "^" if y == top else "v"
            ax.plot(x, y, marker, color=colour, markersize=9 if p.name == name else 6)
        pad, start, end = 0.06 * (top - bottom), zero - 0.5, max(*xs, right) + 0.13 * (right - zero)
        ax.set(xlim=(start, end), ylim=(bottom - pad, top + pad))
        ticks = range(left, right + 1, 1 if right - left < 6 else 2)
        ax.set_xticks([zero, *ticks], ["0", *(human_bytes(10**n) for n in ticks)])
        ax.set(xlabel="kept per person", ylabel=f"{metric}, {'lower' if low else 'higher'} is better")
        edge, tall = _WIDTH - 60, (height - 65) / (top - bottom)
        flat = [(x - start) / (end - start) * edge for x in xs]
        spots = [(x, (y - bottom) * tall) for x, y in zip(flat, ys)]
        bars = [(x, (p.score.low - bottom) * tall, x, (p.score.high - bottom) * tall) for x, p in zip(flat, points)]
        texts = [p.name if y == p.score.mean else f"{p.name} ({p.score.mean:.2f})" for p, y in zip(points, ys)]
        inks = [INK if colour == MUTED else colour for colour in colours]
        write_labels(ax, list(zip(xs, ys)), spots, list(zip(texts, inks, (p.name == name for p in points))), edge, bars)

    told = _list(f"{p.name} {p.score.mean:.3f} with {human_bytes(p.bytes)}" for p in points)
    return _drawn("scatter", f"{metric} against bytes kept per person: {told}.", _WIDTH, height, draw)


def write_labels(
    ax: Any,
    at: Sequence[Sequence[float]],
    spots: Sequence[tuple[float, float]],
    labels: Sequence[tuple[str, str, bool]],
    edge: float,
    bars: Sequence[_Box] = (),
) -> None:
    """Labels (text, colour, bold) beside their points, where they cover little: first come, first served.

    ``at`` is in the data's units; ``spots`` and ``bars`` are in points from the left edge, ``edge`` is the right one.
    """
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    for place, (x, y), (text, colour, bold) in zip(at, spots, labels):
        text = text if len(text) <= 30 else text[:29] + "…"
        wide = 6.4 * len(text)
        tries = [(dx, dy) for dy in (0, 14, -14, 28, -28, 42, -42) for dx in (9, -9 - wide)]
        boxes = [(x + dx, y + dy - 6.5, x + dx + wide, y + dy + 6.5) for dx, dy in tries]
        costs = [
            8 * sum(_overlap(box, other) for other in taken)
            + 2 * sum(_overlap(box, bar) for bar in bars)
            + 40 * (box[0] < 0 or box[2] > edge)
            + abs(dy) / 14
            for box, (_, dy) in zip(boxes, tries)
        ]
        best = costs.index(min(costs))
        taken.append(boxes[best])
        dx, dy = tries[best]
        how: dict[str, Any] = {"textcoords": "offset points", "va": "center_baseline", "zorder": 6}
        if abs(dy) > 14:
            how["arrowprops"] = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        side = {"ha": "left" if dx > 0 else "right", "weight": "bold" if bold else "normal", "color": colour}
        ax.annotate(text, place, (9 if dx > 0 else -9, dy), **how, **side).set_in_layout(False)


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


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


def _drawn(name: str, alt: str, width: float, height: float, draw: Callable[[Any], None]) -> str:
    require("eval", "matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
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
