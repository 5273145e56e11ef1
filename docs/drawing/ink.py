"""A sheet of SVG, the few colours of all drawings, and what is drawn on it: shapes, texts and arrows.

A colour means the same everywhere: grey is the frozen base, blue the task LoRA, orange the anchors and what is merged
of them, green what is a person's own, purple what holds texts. They are Okabe and Ito's, which colour-blind readers can
tell apart; and nothing is said by colour alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

INK, SOFT, LINE, GROUND, PAPER = "#1f2933", "#5b6575", "#c9d1db", "#f5f7fa", "#ffffff"
FONT = "'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
Point = tuple[float, float]


class Tone(NamedTuple):
    """One colour as a line, as a light filling, and as a text dark enough to be read."""

    line: str
    fill: str
    text: str


BASE = Tone("#7b8794", "#e1e6ec", "#3e4c59")
TASK = Tone("#0072b2", "#cfe4f3", "#00507d")
ANCHOR = Tone("#d08700", "#fce6bd", "#825200")
PERSON = Tone("#009e73", "#c9eddf", "#00664a")
TEXTS = Tone("#b0528a", "#f7e0ee", "#7e2f60")


class Sheet:
    """A drawing of a given size on white paper, so that it can be read on a dark page too."""

    def __init__(self, width: float, height: float, title: str, about: str) -> None:
        self.size = width, height
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            f' role="img" font-family="{FONT}">',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(about)}</desc>",
        ]
        self.rect(0.5, 0.5, width - 1, height - 1, PAPER, LINE, r=12, width=1)
        self.text(32, 44, title, size=22, bold=True)
        self.text(32, 68, about, colour=SOFT)

    def svg(self) -> str:
        """The whole file."""
        return "\n".join([*self._parts, "</svg>", ""])

    def rect(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        fill: str = "none",
        stroke: str = "none",
        *,
        r: float = 0,
        width: float = 1.5,
        dash: str = "",
    ) -> None:
        """A rectangle, its corners rounded by ``r``."""
        self._shape("rect", _numbers(x=x, y=y, width=w, height=h, rx=r), fill, stroke, width, dash)

    def circle(self, x: float, y: float, r: float, fill: str, stroke: str = "none", width: float = 1.5) -> None:
        """A circle around a point."""
        self._shape("circle", _numbers(cx=x, cy=y, r=r), fill, stroke, width, "")

    def path(self, d: str, fill: str = "none", stroke: str = "none", width: float = 1.5, dash: str = "") -> None:
        """Whatever else: a path in SVG's own words."""
        self._shape("path", f'd="{d}"', fill, stroke, width, dash)

    def line(self, points: Sequence[Point], stroke: str = SOFT, width: float = 1.5, dash: str = "") -> None:
        """Straight from point to point."""
        self.path("M" + " L".join(f"{_short(x)} {_short(y)}" for x, y in points), "none", stroke, width, dash)

    def arrow(self, *points: Point, colour: str = SOFT, width: float = 1.8, dash: str = "") -> None:
        """A line with a head at its last point."""
        (x0, y0), (x, y) = points[-2:]
        far = max(abs(x - x0), abs(y - y0), 1e-9) if x == x0 or y == y0 else ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
        ux, uy = (x - x0) / far, (y - y0) / far
        self.line([*points[:-1], (x - 7 * ux, y - 7 * uy)], colour, width, dash)
        corners = (x, y), (x - 9 * ux - 5 * uy, y - 9 * uy + 5 * ux), (x - 9 * ux + 5 * uy, y - 9 * uy - 5 * ux)
        self.path("M" + " L".join(f"{_short(a)} {_short(b)}" for a, b in corners) + " Z", colour)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 14,
        colour: str = INK,
        at: str = "start",
        bold: bool = False,
        italic: bool = False,
    ) -> None:
        """A line of text whose baseline begins at (x, y), or is centred (``middle``), or ends there.

        ``_{k}`` is set below the line, ``^{T}`` above it.
        """
        style = f' font-size="{size}" fill="{colour}"' + (f' text-anchor="{at}"' if at != "start" else "")
        style += ' font-weight="bold"' * bold + ' font-style="italic"' * italic
        self._parts.append(f"<text {_numbers(x=x, y=y)}{style}>{_raised(words, size)}</text>")

    def lines(self, x: float, y: float, words: Sequence[str], *, leading: float = 19, **how: Any) -> None:
        """Lines of text below each other."""
        for number, line in enumerate(words):
            self.text(x, y + number * leading, line, **how)

    def _shape(self, tag: str, where: str, fill: str, stroke: str, width: float, dash: str) -> None:
        edge = f' stroke="{stroke}" stroke-width="{width}"' if stroke != "none" else ""
        edge += f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(f'<{tag} {where} fill="{fill}"{edge}/>')


def _short(number: float) -> str:
    return f"{round(number, 2):g}"


def _numbers(**values: float) -> str:
    return " ".join(f'{name}="{_short(value)}"' for name, value in values.items() if value or name in "x y cx cy")


def _raised(words: str, size: float) -> str:
    """Sub- and superscripts as spans that go down, or up, and come back."""
    done, small, back = "", _short(0.72 * size), 0.0
    for plain, mark, inner in re.findall(r"([^_^]+|[_^](?!\{))|([_^])\{([^}]*)\}", words):
        shift = {"": 0.0, "_": 0.25, "^": -0.4}[mark] * size
        move = f' dy="{_short(shift - back)}"' if shift != back else ""
        inside = escape(plain or inner)
        tall = f' font-size="{small}"' if mark else ""
        done += f"<tspan{move}{tall}>{inside}</tspan>" if move or tall else inside
        back = shift
    return done
