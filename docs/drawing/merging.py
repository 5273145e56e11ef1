"""Stage 2: what the shots say about the anchors, and the merge that is made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from drawing.glyphs import badge, card, note, person, texts
from drawing.ink import ANCHOR, LINE, PERSON, SOFT, TASK, Sheet

GAINS = (9.0, -5.0, 4.0, -9.0, 12.0, 1.0)  # nats the shots gain under each anchor over the task LoRA alone
PRIOR, TEMPERATURE = 0.5, 4.0  # of the null anchor, and T: the defaults


def posterior(gains: Sequence[float], null: float, temperature: float) -> list[float]:
    """The anchors' coefficients, as in ``mta.personalize.policies.posterior``. The null anchor has the rest up to 1."""
    masses = [(1 - null) / len(gains) * math.exp(gain / temperature) for gain in gains]
    return [mass / (sum(masses) + null) for mass in masses]


def stage_2() -> Sheet:
    """Retrieve and merge."""
    about = "Anchors that explain the person's shots better get more weight. No anchor is trained."
    sheet = Sheet(960, 548, "Stage 2: retrieve and merge", about)
    card(sheet, 24, 90, 556, 346)
    card(sheet, 604, 90, 332, 346)
    sheet.arrow((582, 262), (604, 262), colour=ANCHOR.line, width=2.4)
    badge(sheet, 50, 118, "1", "Evidence from the shots", ANCHOR)
    badge(sheet, 420, 118, "2", "Coefficients w", PERSON)
    badge(sheet, 630, 118, "3", "Merge, exact", ANCHOR)
    person(sheet, 60, 226, PERSON, size=44)
    texts(sheet, 88, 238, 4)
    sheet.text(84, 294, "shots", at="middle")
    _rows(sheet, 150, 160)
    _concatenated(sheet, 624, 150)
    sheet.line([(32, 456), (928, 456)], LINE)
    note(
        sheet,
        32,
        482,
        "Null anchor",
        ["the task LoRA alone: if no anchor helps,", "w is nearly 0 and nothing is added"],
    )
    note(
        sheet,
        336,
        482,
        "Which anchors",
        ["the authors' README: the 2 nearest;", "our default: all, most with little weight"],
    )
    note(sheet, 650, 482, "How w is found", ["policies: posterior (drawn here),", "ridge, learned, similarity, ..."])
    return sheet


def _rows(sheet: Sheet, x: float, y: float) -> None:
    """Each anchor a row: how much likelier the shots are under it, and the coefficient that follows."""
    zero, wide, step = x + 150, 8.0, 34
    w = posterior(GAINS, PRIOR, TEMPERATURE)
    sheet.line([(zero, y - 8), (zero, y + step * 7 - 8)], SOFT)
    sheet.line([(x + 270, y - 8), (x + 270, y + step * 7 - 8)], SOFT)
    for n, gain in enumerate((*GAINS, 0.0)):
        top, null = y + step * n, n == len(GAINS)
        name = "null" if null else f"anchor {n + 1}"
        colour = TASK.text if null else ANCHOR.text
        sheet.text(x, top + 15, name, size=13, colour=colour)
        left, length = zero + min(gain, 0) * wide, abs(gain) * wide
        if null:
            sheet.circle(zero, top + 10, 4.5, TASK.line)
        else:
            sheet.rect(left, top, length, 20, ANCHOR.fill, ANCHOR.line)
        share = 1 - sum(w) if null else w[n]
        tone = TASK if null else PERSON
        sheet.rect(x + 270, top, max(share * 190, 1.5), 20, tone.fill, tone.line)
        sheet.text(x + 278 + share * 190, top + 15, f"{share:.2f}", size=12, colour=tone.text)
    foot = y + step * 7 + 10
    sheet.text(zero - 8, foot, "worse", size=12, colour=SOFT, at="end")
    sheet.text(zero + 8, foot, "better", size=12, colour=SOFT)
    sheet.text(zero, foot + 17, "than the task LoRA alone", size=12, colour=SOFT, at="middle")
    sheet.text(x + 270, foot, "null: the rest up to 1", size=12, colour=SOFT)


def _concatenated(sheet: Sheet, x: float, y: float) -> None:
    """B's side by side, each times its w; A's below each other: one LoRA of rank K * R."""
    sheet.text(x + 6, y + 18, "Δ = Σ_{k} w_{k} s B_{k} A_{k}", size=17, bold=True)
    names, shades = ("1", "3", "5"), ("#fce6bd", "#fdf3df", "#f3c15c")
    for n, (name, shade) in enumerate(zip(names, shades)):
        left, top = x + 10 + 34 * n, y + 66 + 34 * n
        sheet.rect(left, y + 66, 34, 128, shade, ANCHOR.line)
        sheet.text(left + 17, y + 134, f"B_{{{name}}}", size=13, colour=ANCHOR.text, at="middle", italic=True)
        sheet.text(left + 17, y + 58, f"w_{{{name}}} s", size=12, colour=PERSON.text, at="middle")
        sheet.rect(x + 146, top, 128, 34, "#fce6bd", ANCHOR.line)
        sheet.text(x + 210, top + 22, f"A_{{{name}}}", size=13, colour=ANCHOR.text, at="middle", italic=True)
    sheet.text(x + 129, y + 134, "·", size=22, at="middle", bold=True)
    sheet.text(x + 61, y + 212, "(O, K R)", size=12, colour=SOFT, at="middle")
    sheet.text(x + 210, y + 186, "(K R, D)", size=12, colour=SOFT, at="middle")
    sheet.text(x + 210, y + 58, "three of six drawn", size=12, colour=SOFT, at="middle")
    words = [
        "Factors are concatenated on the rank axis:",
        "no cross terms, no dense update. It is never",
        "stored: bank and w reproduce it at any time.",
    ]
    sheet.lines(x + 6, y + 236, words, size=12.5, colour=SOFT, leading=18)
