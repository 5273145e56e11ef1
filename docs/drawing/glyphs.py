"""The signs that drawings share: people, their texts, LoRAs as the matrices they are, bars, cards."""

from __future__ import annotations

from collections.abc import Sequence

from drawing.ink import BASE, GROUND, INK, LINE, PAPER, SOFT, TEXTS, Sheet, Tone


def person(sheet: Sheet, x: float, y: float, tone: Tone = BASE, size: float = 26) -> None:
    """Head and shoulders, ``size`` high, centred at x, from y down."""
    head, left, right, foot = size * 0.25, x - size * 0.4, x + size * 0.4, y + size
    sheet.circle(x, y + head, head, tone.line)
    top = foot - size * 0.42 - 3
    shoulders = f"C{left:.1f} {top:.1f} {right:.1f} {top:.1f} {right:.1f} {foot:.1f}"
    sheet.path(f"M{left:.1f} {foot:.1f} {shoulders} Z", tone.line)


def texts(sheet: Sheet, x: float, y: float, count: int = 3, w: float = 24, h: float = 30, step: float = 7) -> None:
    """A pile of ``count`` written items."""
    for n in reversed(range(count)):
        left, top = x + n * step, y - n * step * 0.6
        sheet.rect(left, top, w, h, TEXTS.fill, TEXTS.line, r=3, width=1.2)
    for row in range(3):
        end = x + w - (6 if row < 2 else 12)
        sheet.line([(x + 5, y + 8 + 7 * row), (end, y + 8 + 7 * row)], TEXTS.line, 1.2)


def lora(
    sheet: Sheet, x: float, y: float, side: float, rank: float, tone: Tone, names: tuple[str, str] = ("", "")
) -> float:
    """B, tall and narrow, beside A, wide and low: a LoRA of that rank over a square matrix. Returns its width."""
    sheet.rect(x, y, rank, side, tone.fill, tone.line)
    sheet.rect(x + rank + 4, y, side, rank, tone.fill, tone.line)
    below = y + side + 15
    if names[0]:
        sheet.text(x + rank / 2, below, names[0], size=13, colour=tone.text, at="middle", italic=True)
        middle = x + rank + 4 + side / 2
        sheet.text(middle, y + rank + 16, names[1], size=13, colour=tone.text, at="middle", italic=True)
    return rank + 4 + side


def weight(sheet: Sheet, x: float, y: float, side: float, name: str = "W_{0}") -> None:
    """The frozen weight of a layer."""
    sheet.rect(x, y, side, side, BASE.fill, BASE.line)
    sheet.text(x + side / 2, y + side / 2 + 5, name, colour=BASE.text, at="middle", italic=True)


def card(sheet: Sheet, x: float, y: float, w: float, h: float, fill: str = PAPER, stroke: str = LINE) -> None:
    """A place of its own on the sheet."""
    sheet.rect(x, y, w, h, fill, stroke, r=10, width=1.2)


def group(sheet: Sheet, x: float, y: float, w: float, h: float, name: str) -> None:
    """A ground that cards lie on, and what it is called."""
    sheet.rect(x, y, w, h, GROUND, r=14)
    sheet.text(x + 16, y + 25, name, colour=SOFT, bold=True)


def badge(sheet: Sheet, x: float, y: float, number: str, name: str, tone: Tone) -> None:
    """The number of a stage or step in a circle, and its name beside it."""
    sheet.circle(x, y, 12, tone.line)
    sheet.text(x, y + 5, number, size=13, colour=PAPER, at="middle", bold=True)
    sheet.text(x + 20, y + 5, name, size=15, colour=INK, bold=True)


def tag(sheet: Sheet, x: float, y: float, name: str, tone: Tone, w: float = 62) -> None:
    """A small label in a pill, centred at x: frozen, trained."""
    sheet.rect(x - w / 2, y, w, 20, tone.fill, tone.line, r=10, width=1)
    sheet.text(x, y + 14.5, name, size=12, colour=tone.text, at="middle")


def bars(sheet: Sheet, x: float, y: float, heights: Sequence[float], tone: Tone, w: float = 14, gap: float = 6) -> None:
    """Columns that stand on y; the axis goes below all of them."""
    for n, height in enumerate(heights):
        sheet.rect(x + n * (w + gap), y - height, w, height, tone.fill, tone.line)
    sheet.line([(x - 5, y), (x + len(heights) * (w + gap) - gap + 5, y)], SOFT)


def funnel(sheet: Sheet, x: float, y: float, rank: float, tone: Tone, names: tuple[str, str] = ("A", "B")) -> None:
    """A LoRA on the way of an activation, centred on y, 110 wide: A narrows to the rank, B widens again."""
    for left, right, x0, name in ((21, rank / 2, x, names[0]), (rank / 2, 21, x + 58, names[1])):
        d = f"M{x0} {y - left:g} L{x0 + 52} {y - right:g} L{x0 + 52} {y + right:g} L{x0} {y + left:g} Z"
        sheet.path(d, tone.fill, tone.line)
        middle = x0 + (18 if left > right else 34)
        sheet.text(middle, y + 5, name, size=13, colour=tone.text, at="middle", italic=True)


def note(sheet: Sheet, x: float, y: float, head: str, words: Sequence[str]) -> None:
    """A short heading and lines below it."""
    sheet.text(x, y, head, bold=True)
    sheet.lines(x, y + 20, words, leading=18, size=13, colour=SOFT)
