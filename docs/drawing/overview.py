"""The whole method in one drawing."""

from __future__ import annotations

from drawing.glyphs import badge, bars, card, group, lora, person, tag, texts, weight
from drawing.ink import ANCHOR, BASE, PERSON, SOFT, TASK, Sheet

CLUSTERS = (  # where candidates lie in a plane, and how many items they have; the first of each has most
    ((22, 24, 7.5), (8, 12, 4), (34, 10, 3), (12, 36, 3.5), (38, 34, 4.5)),
    ((104, 18, 7), (90, 8, 4), (120, 30, 3.5), (92, 32, 3), (124, 10, 4)),
    ((36, 86, 8), (18, 78, 4), (24, 98, 3), (54, 78, 4), (52, 98, 3.5)),
    ((112, 80, 7), (98, 92, 3), (128, 92, 4), (96, 70, 4), (126, 68, 3)),
)


def plane(sheet: Sheet, x: float, y: float, scale: float = 1.0) -> None:
    """Candidates in clusters; the most active of each is ringed: an anchor."""
    for cluster in CLUSTERS:
        cx = sum(dot[0] for dot in cluster) / len(cluster)
        cy = sum(dot[1] for dot in cluster) / len(cluster)
        sheet.circle(x + scale * cx, y + scale * cy, 29 * scale, "#ffffff", "#c9d1db", 1.2)
        for n, (dx, dy, r) in enumerate(cluster):
            tone = BASE if n else ANCHOR
            sheet.circle(x + scale * dx, y + scale * dy, scale * r, tone.fill if n else tone.line, tone.line, 1.2)
        sheet.circle(
            x + scale * cluster[0][0], y + scale * cluster[0][1], scale * (cluster[0][2] + 4), "none", ANCHOR.line
        )


def stages() -> Sheet:
    """All four stages, and what is kept of a person."""
    about = (
        "The bank is built once. Each person needs a few examples, and is stored as some numbers and one small LoRA."
    )
    sheet = Sheet(960, 640, "Merge, then adapt", about)
    group(sheet, 24, 88, 444, 430, "Once, for all people")
    group(sheet, 492, 88, 444, 430, "For each new person")
    _task_lora(sheet, 40, 126)
    _bank(sheet, 40, 316)
    _merge(sheet, 508, 126)
    _stack(sheet, 508, 316)
    _kept(sheet, 24, 534)
    sheet.arrow((246, 300), (246, 316))
    sheet.arrow((452, 410), (480, 410), (480, 216), (508, 216), colour=ANCHOR.line, width=2.4)
    sheet.arrow((714, 300), (714, 316))
    sheet.arrow((714, 502), (714, 534), colour=PERSON.line)
    return sheet


def _task_lora(sheet: Sheet, x: float, y: float) -> None:
    card(sheet, x, y, 412, 174)
    badge(sheet, x + 26, y + 26, "0", "Task LoRA", TASK)
    for n in range(8):
        person(sheet, x + 34 + 26 * (n % 4), y + 56 + 36 * (n // 4), size=28)
    sheet.arrow((x + 136, y + 88), (x + 160, y + 88))
    texts(sheet, x + 172, y + 78, 6, step=6)
    sheet.arrow((x + 240, y + 88), (x + 264, y + 88))
    weight(sheet, x + 276, y + 56, 56)
    sheet.text(x + 343, y + 90, "+", size=18, at="middle")
    lora(sheet, x + 354, y + 56, 34, 9, TASK)
    sheet.text(x + 20, y + 156, "One LoRA on the pooled items of all people", size=13, colour=SOFT)


def _bank(sheet: Sheet, x: float, y: float) -> None:
    card(sheet, x, y, 412, 186)
    badge(sheet, x + 26, y + 26, "1", "Bank of meta-LoRAs", ANCHOR)
    plane(sheet, x + 26, y + 50, 0.92)
    sheet.arrow((x + 170, y + 98), (x + 212, y + 98))
    sheet.text(x + 191, y + 88, "train", size=12, colour=SOFT, at="middle")
    sheet.rect(x + 222, y + 50, 172, 96, "none", ANCHOR.line, r=8, dash="5 4")
    for n in range(4):
        lora(sheet, x + 236 + 80 * (n % 2), y + 58 + 44 * (n // 2), 36, 9, ANCHOR)
        sheet.text(x + 268 + 80 * (n % 2), y + 86 + 44 * (n // 2), str(n + 1), size=12, colour=ANCHOR.text, at="middle")
    sheet.text(x + 20, y + 172, "The most active person of each cluster is its anchor", size=13, colour=SOFT)


def _merge(sheet: Sheet, x: float, y: float) -> None:
    card(sheet, x, y, 412, 174)
    badge(sheet, x + 26, y + 26, "2", "Merge", ANCHOR)
    person(sheet, x + 42, y + 64, PERSON, size=40)
    texts(sheet, x + 70, y + 74, 3)
    sheet.text(x + 68, y + 128, "shots", size=13, at="middle")
    sheet.arrow((x + 124, y + 86), (x + 152, y + 86))
    bars(sheet, x + 170, y + 110, (14, 46, 6, 28), PERSON, w=16)
    for n in range(4):
        sheet.text(x + 178 + 22 * n, y + 126, f"w_{{{n + 1}}}", size=12, colour=PERSON.text, at="middle")
    sheet.arrow((x + 268, y + 86), (x + 296, y + 86))
    lora(sheet, x + 312, y + 54, 58, 17, ANCHOR)
    sheet.text(x + 368, y + 98, "merge", size=13, colour=ANCHOR.text, at="middle")
    sheet.text(x + 20, y + 156, "Coefficients w are fitted to the shots; anchors stay frozen", size=13, colour=SOFT)


def _stack(sheet: Sheet, x: float, y: float) -> None:
    card(sheet, x, y, 412, 186)
    badge(sheet, x + 26, y + 26, "3", "Stack", PERSON)
    weight(sheet, x + 24, y + 54, 56)
    lora(sheet, x + 108, y + 54, 42, 10, TASK)
    lora(sheet, x + 194, y + 54, 52, 17, ANCHOR)
    lora(sheet, x + 302, y + 54, 50, 4, PERSON)
    for at in (94, 180, 284):
        sheet.text(x + at, y + 88, "+", size=18, at="middle")
    for at, name in ((52, "base"), (136, "task LoRA"), (230, "merge"), (332, "stack, rank 1")):
        sheet.text(x + at, y + 128, name, size=12, at="middle")
    sheet.line([(x + 24, y + 139), (x + 266, y + 139)], BASE.line, 1.2)
    tag(sheet, x + 145, y + 129 + 16, "frozen", BASE)
    tag(sheet, x + 332, y + 129 + 16, "trained", PERSON)


def _kept(sheet: Sheet, x: float, y: float) -> None:
    sheet.rect(x, y, 912, 82, PERSON.fill, PERSON.line, r=12)
    person(sheet, x + 38, y + 20, PERSON, size=42)
    sheet.text(x + 76, y + 34, "Stored per person", size=15, bold=True)
    sheet.text(x + 76, y + 58, "anchor numbers and w: a few hundred bytes")
    sheet.text(x + 408, y + 58, "+", size=16, bold=True, at="middle")
    sheet.text(x + 428, y + 58, "one rank-1 stack")
    lora(sheet, x + 566, y + 24, 38, 4, PERSON)
    sheet.line([(x + 630, y + 14), (x + 630, y + 68)], PERSON.line, 1.2)
    sheet.lines(x + 652, y + 36, ["Not stored: the merge and,", "by default, the texts"], leading=22)
