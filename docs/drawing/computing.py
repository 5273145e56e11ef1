"""How many people are computed at once: batched adapters, and rows that are trees of tokens."""

from __future__ import annotations

from drawing.glyphs import card
from drawing.ink import BASE, INK, PERSON, SOFT, TEXTS, Sheet

PEOPLE = (("ann", "#c9eddf"), ("bob", "#7fd3b8"), ("cyd", "#2fae8b"))
BRANCHES = (3, 2, 4)  # tokens of the examples after what they share
SHARED = 6
OWN = "#d9a3c6"  # a darker purple, for what examples do not share


def batch() -> Sheet:
    """One pass for rows of different people."""
    about = "The base's weights are read once for all rows; each row gets only its own person's update."
    sheet = Sheet(960, 676, "Many people in one forward pass", about)
    card(sheet, 24, 90, 912, 316)
    sheet.text(44, 118, "A layer", size=15, bold=True)
    _rows(sheet, 96, 176, "x")
    _rows(sheet, 764, 176, "y")
    _products(sheet)
    card(sheet, 24, 422, 912, 230)
    sheet.text(44, 450, "A row", size=15, bold=True)
    _apart(sheet, 44, 490)
    _together(sheet, 370, 490)
    _mask(sheet, 696, 470)
    return sheet


def _rows(sheet: Sheet, x: float, y: float, name: str) -> None:
    sheet.text(x + 50, y - 14, name, size=17, italic=True, at="middle")
    for n in range(6):
        who, shade = PEOPLE[n // 2]
        sheet.rect(x, y + 26 * n, 100, 22, shade, PERSON.line)
        if name == "x":
            sheet.text(x - 12, y + 16 + 26 * n, who, size=13, colour=PERSON.text, at="end")
    shape = "(B, T, D)" if name == "x" else "(B, T, O)"
    sheet.text(x + 50, y + 176, shape, size=12, colour=SOFT, at="middle")


def _products(sheet: Sheet) -> None:
    sheet.line([(204, 253), (236, 253)], SOFT, 1.8)
    sheet.line([(236, 180), (236, 320)], SOFT, 1.8)
    sheet.arrow((236, 180), (262, 180))
    sheet.arrow((236, 320), (262, 320))
    sheet.rect(268, 140, 396, 76, BASE.fill, BASE.line)
    sheet.text(466, 172, "x W_{0}^{T}", size=17, at="middle", italic=True)
    sheet.text(466, 198, "one product for all rows, frozen", size=13, colour=BASE.text, at="middle")
    for n, (_, shade) in reversed(list(enumerate(PEOPLE))):
        sheet.rect(284 + 16 * n, 298 - 16 * n, 150, 30, shade, PERSON.line)
        sheet.rect(520 + 14 * n, 272 - 13 * n, 30, 96, shade, PERSON.line)
    sheet.text(359, 318, "ann's A", size=13, at="middle")
    sheet.arrow((474, 320), (508, 320))
    sheet.text(535, 338, "B", size=13, at="middle")
    sheet.text(359, 350, "A (U, R, D)", size=13, colour=SOFT, at="middle")
    sheet.text(535, 388, "B (U, O, R)", size=13, colour=SOFT, at="middle")
    sheet.lines(594, 316, ["two batched", "products", "per layer"], size=13, colour=SOFT, leading=17)
    sheet.line([(670, 180), (706, 180), (706, 320), (682, 320)], SOFT, 1.8)
    sheet.circle(718, 253, 12, "#ffffff", SOFT, 1.8)
    sheet.text(718, 259, "+", size=17, at="middle")
    sheet.arrow((732, 253), (758, 253))


def _token(sheet: Sheet, x: float, y: float, shared: bool) -> None:
    sheet.rect(x, y, 16, 16, TEXTS.fill if shared else OWN, TEXTS.line, r=2, width=1.2)


def _apart(sheet: Sheet, x: float, y: float) -> None:
    sheet.text(x, y - 14, "examples of a person, one by one", size=13, colour=SOFT)
    for n, own in enumerate(BRANCHES):
        for i in range(SHARED + own):
            _token(sheet, x + 19 * i, y + 34 * n + 6, i < SHARED)
    total = sum(BRANCHES) + SHARED * len(BRANCHES)
    sheet.text(x, y + 124, f"{total} tokens", bold=True)
    sheet.text(x, y + 146, "instruction and template repeated", size=12, colour=SOFT)


def _together(sheet: Sheet, x: float, y: float) -> None:
    sheet.text(x, y - 14, "as one tree", size=13, colour=SOFT)
    for i in range(SHARED):
        _token(sheet, x + 19 * i, y + 40, True)
    fork = x + 19 * SHARED + 2
    for n, own in enumerate(BRANCHES):
        level = y + 14 + 34 * n
        sheet.line([(fork - 5, y + 48), (fork + 8, y + 48), (fork + 8, level), (fork + 20, level)], SOFT)
        for i in range(own):
            _token(sheet, fork + 22 + 19 * i, level - 8, False)
    sheet.text(x, y + 124, f"{SHARED + sum(BRANCHES)} tokens", bold=True)
    sheet.text(x, y + 146, "shared tokens are computed once", size=12, colour=SOFT)


def ends() -> list[int]:
    """Of each token in depth-first order: one past the last token of its subtree."""
    total, found = SHARED + sum(BRANCHES), [SHARED + sum(BRANCHES)] * SHARED
    for own in BRANCHES:
        found += [len(found) + own] * own
    assert len(found) == total
    return found


def _mask(sheet: Sheet, x: float, y: float, cell: float = 8.6) -> None:
    """Who sees whom: token i sees j exactly when j <= i < end[j]."""
    end = ends()
    for i in range(len(end)):
        for j in range(len(end)):
            if j <= i < end[j]:
                shade = OWN if j < SHARED else TEXTS.line
                sheet.rect(x + cell * j, y + cell * i, cell - 1.4, cell - 1.4, shade)
    side = cell * len(end)
    sheet.rect(x - 3, y - 3, side + 5, side + 5, "none", SOFT, width=1)
    sheet.text(x - 10, y + side / 2, "i", size=13, italic=True, at="end")
    sheet.text(x + side / 2, y + side + 18, "j", size=13, italic=True, at="middle")
    words = ("a token sees", "its ancestors:", "the numbers", "are those of", "separate rows")
    sheet.lines(x + side + 14, y + 14, words, size=12, colour=INK, leading=17)
