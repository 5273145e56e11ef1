"""Draws the pictures of the documentation: ``python docs/pictures.py [folder]``.

``drawing/<name>.txt`` describes a picture: title, subtitle, size, then one shape per line: the name of a function of
this module, numbers, options, and texts after ``|``. Colors have a meaning: ``base`` is the frozen base, ``task`` the
task LoRA, ``anchor`` the anchors and their merge, ``person`` the parts of one person, ``texts`` people's texts. They
are near the palette of Okabe and Ito, and differ in lightness where color-blind readers see equal hues.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from html import escape
from operator import mul
from pathlib import Path

FOLDER = Path(__file__).parent / "drawing"
Point = tuple[float, float]
INK, SOFT, LINE, GROUND, PAPER = "#1f2933", "#5b6575", "#c9d1db", "#f5f7fa", "#ffffff"
FONT = "'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
TONES = {  # line, fill, text
    "base": ("#7b8794", "#e1e6ec", "#3e4c59"),
    "task": ("#0072b2", "#cfe4f3", "#00507d"),
    "anchor": ("#d08700", "#fce6bd", "#825200"),
    "person": ("#009e73", "#c9eddf", "#00664a"),
    "texts": ("#8a2b6b", "#efc3dc", "#6a1f52"),
}
GRADIENTS = (3.0, -2.0, 1.5, -4.0, 5.0, 0.5)  # of four shots, in the coefficient of each anchor
MU = (0.2, 0.15, 0.25, 0.1, 0.2, 0.15)
CURVATURES = (2.0, 6.0, 3.0, 5.0, 3.0, 2.0)  # of one shot; anchors vary independently here
SHOTS, PRIOR, RIDGE, LOSS = 4, 2.0, 0.3, 2.0
SHARED, BRANCHES = 6, (3, 2, 4)  # tokens that a person's examples share, and the tokens of each example


@dataclass(frozen=True)
class Shape:
    """One line of a description: numbers, options, texts, and the colors of its tone."""

    at: list[float]
    options: Set[str] = frozenset()
    words: Sequence[str] = ()
    tone: tuple[str, str, str] = TONES["base"]


def picture(description: str) -> str:
    """Return the SVG of a description."""
    title, about, size, *lines = [line for line in description.splitlines() if line]
    width, height = size.split()
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img" font-family="{FONT}">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape(about)}</desc>",
        _rect(0.5, 0.5, float(width) - 1, float(height) - 1, PAPER, LINE, 12),
        _text(32, 44, title, 22, options={"bold"}),
        _text(32, 68, about, color=SOFT),
    ]
    for line in lines:
        head, *words = line.split(" | ")
        name, *rest = head.split()
        at = [float(word) for word in rest if re.fullmatch(r"-?[\d.]+", word)]
        options = {word for word in rest if word[0].isalpha()}
        tone = next((TONES[name] for name in TONES if name in options), TONES["base"])
        parts += SHAPES[name](Shape(at, options, words, tone))
    return "\n".join([*parts, "</svg>", ""])


def text(shape: Shape) -> list[str]:
    """x y [size]: lines of text. A tone colors them; ``soft`` makes them grey."""
    x, y, size = (*shape.at, 14)[:3]
    color = SOFT if "soft" in shape.options else shape.tone[2] if shape.options & TONES.keys() else INK
    leading = max(1.35 * size, 17)
    return [_text(x, y + n * leading, line, size, color, shape.options) for n, line in enumerate(shape.words)]


def box(shape: Shape) -> list[str]:
    """x y w h: a rectangle with a title and lines. Options: ``fill``, ``ground``, ``dash``, ``middle``."""
    x, y, w, h = shape.at
    line, fill, color = shape.tone
    ground = fill if "fill" in shape.options else GROUND if "ground" in shape.options else PAPER
    left = x + w / 2 if "middle" in shape.options else x + 14
    made = [_rect(x, y, w, h, ground, line, 8, "5 4" if "dash" in shape.options else "")]
    for n, words in enumerate(shape.words):
        where = left, y + 24 + 20 * n
        made += [_text(*where, words, 12.5, color, shape.options) if n else _title(*where, words, shape.options)]
    return made


def band(shape: Shape) -> list[str]:
    """x y w h [offset of the name]: the named background of a group."""
    x, y, w, h, offset = (*shape.at, 16)[:5]
    fill, color = (shape.tone[1], shape.tone[2]) if shape.options & TONES.keys() else (GROUND, SOFT)
    return [_rect(x, y, w, h, fill, r=12), *(_text(x + offset, y + 24, n, 13, color, {"bold"}) for n in shape.words)]


def note(shape: Shape) -> list[str]:
    """x y: a heading and grey lines below it."""
    x, y = shape.at
    head, *lines = shape.words
    return [_title(x, y, head), *(_text(x, y + 20 + 18 * n, words, 13, SOFT) for n, words in enumerate(lines))]


def line(shape: Shape) -> list[str]:
    """x y x y ...: straight lines from point to point. Option: ``dash``."""
    return [_line(_points(shape.at), shape.tone[0], "dash" in shape.options)]


def arrow(shape: Shape) -> list[str]:
    """x y x y ...: a line with a head at the last point, and a label above its first segment."""
    points = _points(shape.at)
    (x0, y0), (x, y) = points[-2:]
    far = math.hypot(x - x0, y - y0)
    ux, uy = (x - x0) / far, (y - y0) / far
    head = [(x, y), (x - 9 * ux - 5 * uy, y - 9 * uy + 5 * ux), (x - 9 * ux + 5 * uy, y - 9 * uy - 5 * ux)]
    middle, above = (points[0][0] + points[1][0]) / 2, min(points[0][1], points[1][1]) - 8
    labels = [_text(middle, above, words, 12, options={"middle"}) for words in shape.words]
    return [*line(shape), _area(head, shape.tone[0]), *labels]


def circle(shape: Shape) -> list[str]:
    """x y r, repeated: filled circles. A text is centered in them."""
    made = []
    for x, y, r in zip(shape.at[::3], shape.at[1::3], shape.at[2::3]):
        made.append(f'<circle cx="{x:g}" cy="{y:g}" r="{r:g}" fill="{shape.tone[1]}" stroke="{shape.tone[0]}"/>')
        made += [_text(x, y + 5, words, 14, shape.tone[2], {"middle", "bold"}) for words in shape.words]
    return made


def person(shape: Shape) -> list[str]:
    """size x y, more x y: heads and shoulders, centered at x, from y down. Texts are below the last one."""
    size, *places = shape.at
    made = []
    for x, y in _points(places):
        left, right, foot, top = x - 0.4 * size, x + 0.4 * size, y + size, y + 0.58 * size - 3
        body = f"M{left:g} {foot:g} C{left:g} {top:g} {right:g} {top:g} {right:g} {foot:g} Z"
        made.append(f'<circle cx="{x:g}" cy="{y + size / 4:g}" r="{size / 4:g}" fill="{shape.tone[0]}"/>')
        made.append(f'<path d="{body}" fill="{shape.tone[0]}"/>')
    name, *lines = shape.words or [""]
    made += [_title(x, foot + 19, name, {"middle"})] if name else []
    return made + [_text(x, foot + 37, words, 12.5, SOFT, {"middle"}) for words in lines]


def items(shape: Shape) -> list[str]:
    """x y count: a pile of written items."""
    x, y, count = shape.at
    edge, fill, _ = TONES["texts"]
    made = [_rect(x + 7 * n, y - 4 * n, 24, 30, fill, edge, 3) for n in reversed(range(int(count)))]
    rows = [[(x + 5, y + 8 + 7 * n), (x + (12 if n == 2 else 18), y + 8 + 7 * n)] for n in range(3)]
    return [*made, *(_line(row, edge) for row in rows)]


def lora(shape: Shape) -> list[str]:
    """x y side rank: the factors B and A of a LoRA, with their names."""
    x, y, side, rank = shape.at
    edge, fill, color = shape.tone
    made = [_rect(x, y, rank, side, fill, edge), _rect(x + rank + 4, y, side, rank, fill, edge)]
    places = (x + rank / 2, y + side + 15), (x + rank + 4 + side / 2, y + rank + 16)
    return made + [_text(*at, n, 12, color, {"middle", "italic"}) for at, n in zip(places, shape.words)]


def branch(shape: Shape) -> list[str]:
    """x y rank: one summand of a layer: W_0 (rank 0) or a LoRA, its name and formula, ``trained`` or frozen."""
    x, y, rank = shape.at
    edge, fill, color = shape.tone
    name, formula, *factors = shape.words
    state, tone = ("trained", "person") if "trained" in shape.options else ("frozen", "base")
    made = arrow(Shape([x, y, x + 26, y]))
    if rank:
        for left, right, x0 in ((21, rank / 2, x + 30), (rank / 2, 21, x + 88)):
            corners = [(x0, y - left), (x0 + 52, y - right), (x0 + 52, y + right), (x0, y + left)]
            made.append(_area(corners, fill, edge))
    else:
        made.append(_rect(x + 30, y - 21, 110, 42, fill, edge))
    for place, factor in zip((48, 122) if rank else (85,), factors):
        made.append(_text(x + place, y + 5, factor, 13, color, {"middle", "italic"}))
    made += [_title(x + 152, y - 3, name), _text(x + 152, y + 16, formula, 13, SOFT)]
    made += tag(Shape([x + 300, y - 11], words=[state], tone=TONES[tone]))
    return [*made, *line(Shape([x + 336, y, x + 352, y]))]


def badge(shape: Shape) -> list[str]:
    """x y: a number in a circle, and a name beside it."""
    (x, y), (number, name) = shape.at, shape.words
    return [
        f'<circle cx="{x:g}" cy="{y:g}" r="12" fill="{shape.tone[0]}"/>',
        _text(x, y + 5, number, 13, PAPER, {"bold", "middle"}),
        _text(x + 20, y + 5, name, 15, INK, {"bold"}),
    ]


def tag(shape: Shape) -> list[str]:
    """x y: a small label in a pill, centered at x."""
    x, y = shape.at
    edge, fill, color = shape.tone
    return [_rect(x - 31, y, 62, 20, fill, edge, 10), _text(x, y + 14.5, shape.words[0], 12, color, {"middle"})]


def bars(shape: Shape) -> list[str]:
    """x y width height, more heights: columns that stand on y."""
    x, y, width, *heights = shape.at
    made = [_rect(x + n * (width + 6), y - h, width, h, shape.tone[1], shape.tone[0]) for n, h in enumerate(heights)]
    return [*made, *line(Shape([x - 5, y, x + len(heights) * (width + 6) - 1, y]))]


def tokens(shape: Shape) -> list[str]:
    """x y shared own: a row of tokens, the own tokens darker."""
    x, y, shared, own = shape.at
    return [_token(x + 19 * n, y, n < shared, 16) for n in range(int(shared + own))]


def coefficients() -> list[float]:
    """Return the anchors' coefficients, as ``mta.bank.calibration.laplace.Calibration`` does."""
    ridge, means = RIDGE * sum(CURVATURES) / len(CURVATURES), [g / SHOTS for g in GRADIENTS]
    steps = [mean / (f + ridge) for mean, f in zip(means, CURVATURES)]
    trust = SHOTS / (SHOTS + PRIOR) / (1 + sum(map(mul, means, steps)) / LOSS)
    return [m + trust * step for m, step in zip(MU, steps)]


def gradient(shape: Shape) -> list[str]:
    """x y: for each anchor the gradient, and the coefficient: the population's as a frame, the person's filled."""
    (x, y), made = shape.at, []
    for n, (g, m, w) in enumerate(zip(GRADIENTS, MU, coefficients())):
        top, (edge, fill, color), (own, own_fill, own_color) = y + 38 * n, TONES["anchor"], TONES["person"]
        made += [
            _text(x, top + 15, f"anchor {n + 1}", 13, color),
            _rect(x + 130 + min(g, 0) * 10, top, abs(g) * 10, 20, fill, edge),
            _rect(x + 225, top, m * 330, 20, PAPER, edge, dash="3 3"),
            _rect(x + 225 + min(w, 0) * 330, top + 4, abs(w) * 330, 12, own_fill, own),
            _text(x + 233 + max(w, m) * 330, top + 15, f"{w:.2f}", 12, own_color),
        ]
    axes = [[(x + dx, y - 8), (x + dx, y + 38 * len(MU) - 8)] for dx in (130, 225)]
    return made + [_line(axis, SOFT) for axis in axes]


def ends() -> list[int]:
    """For each token in depth-first order: one past the last token of its subtree."""
    found = [SHARED + sum(BRANCHES)] * SHARED
    for own in BRANCHES:
        found += [len(found) + own] * own
    return found


def mask(shape: Shape) -> list[str]:
    """x y: the attention mask of a token tree. Token i sees j if j <= i < ends[j]."""
    (x, y), end, cell = shape.at, ends(), 8.6
    seen = [(i, j) for i in range(len(end)) for j in range(i + 1) if i < end[j]]
    side = cell * len(end)
    return [_token(x + cell * j, y + cell * i, j < SHARED, cell - 1.4) for i, j in seen] + [
        _rect(x - 3, y - 3, side + 5, side + 5, "none", SOFT)
    ]


def _token(x: float, y: float, shared: bool, side: float) -> str:
    return _rect(x, y, side, side, TONES["texts"][1] if shared else "#d9a3c6", TONES["texts"][0], 1)


def _rect(x: float, y: float, w: float, h: float, fill: str, stroke: str = "none", r: float = 0, dash: str = "") -> str:
    edge = f' stroke="{stroke}"' + (f' stroke-dasharray="{dash}"' if dash else "")
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{r:g}" fill="{fill}"{edge}/>'


def _points(numbers: Sequence[float]) -> list[Point]:
    return list(zip(numbers[::2], numbers[1::2]))


def _path(points: Sequence[Point]) -> str:
    return "M" + " L".join(f"{x:.4g} {y:.4g}" for x, y in points)


def _line(points: Sequence[Point], color: str, dash: bool = False) -> str:
    dashes = ' stroke-dasharray="6 4"' * dash
    return f'<path d="{_path(points)}" fill="none" stroke="{color}" stroke-width="1.5"{dashes}/>'


def _area(points: Sequence[Point], fill: str, stroke: str = "none") -> str:
    return f'<path d="{_path(points)} Z" fill="{fill}" stroke="{stroke}"/>'


def _title(x: float, y: float, words: str, options: Set[str] = frozenset()) -> str:
    return _text(x, y, words, 13.5, options=options | {"bold"})


def _text(x: float, y: float, words: str, size: float = 14, color: str = INK, options: Set[str] = frozenset()) -> str:
    """A line of text. ``_{k}`` is set below the line, ``^{T}`` above it."""
    style = "".join(f' text-anchor="{at}"' for at in ("middle", "end") if at in options)
    style += ' font-weight="bold"' * ("bold" in options) + ' font-style="italic"' * ("italic" in options)
    inside, back = "", 0.0
    for plain, mark, inner in re.findall(r"([^_^]+|[_^](?!\{))|([_^])\{([^}]*)\}", words):
        shift = {"": 0.0, "_": 0.25, "^": -0.4}[mark] * size
        small = f' font-size="{0.72 * size:g}"' if mark else ""
        inside += f'<tspan dy="{shift - back:g}"{small}>{escape(plain or inner)}</tspan>'
        back = shift
    if "<tspan dy" in inside and not re.search(r"[_^]\{", words):
        inside = escape(words)
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{color}"{style}>{inside}</text>'


SHAPES: dict[str, Callable[[Shape], list[str]]] = {
    shape.__name__: shape
    for shape in (
        *(text, box, band, note, line, arrow, circle, person, items, lora),
        *(branch, badge, tag, bars, tokens, gradient, mask),
    )
}


def draw(folder: Path) -> None:
    """Write every picture into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(FOLDER.glob("*.txt")):
        made = picture(path.read_text(encoding="utf-8"))
        (folder / f"{path.stem}.svg").write_text(made, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
