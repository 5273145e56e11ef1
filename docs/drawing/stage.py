"""Stages 0, 1 and 3, one drawing each."""

from __future__ import annotations

from drawing.glyphs import badge, card, funnel, note, person, tag, texts
from drawing.ink import ANCHOR, BASE, LINE, PAPER, PERSON, SOFT, TASK, TEXTS, Sheet, Tone
from drawing.overview import plane

Branch = tuple[str, str, Tone, float, tuple[str, str], bool]  # name, formula, tone, rank, names of A and B, trained


def branches(sheet: Sheet, x: float, y: float, rows: list[Branch], step: float = 74) -> tuple[float, float]:
    """A layer: the base's product and what is added to it, side by side from x to y. Returns where y comes out."""
    bottom, middle = y + step * len(rows), y + step * len(rows) / 2
    sheet.text(x, middle + 6, "x", size=19, italic=True, at="middle")
    sheet.line([(x + 14, middle), (x + 36, middle)], SOFT, 1.8)
    sheet.line([(x + 36, y), (x + 36, bottom)], SOFT, 1.8)
    weighted = [("base", "W_{0} x", BASE, 0.0, ("", ""), False), *rows]
    for n, (name, formula, tone, rank, names, trained) in enumerate(weighted):
        level = y + step * n
        sheet.arrow((x + 36, level), (x + 62, level))
        if rank:
            funnel(sheet, x + 66, level, rank, tone, names)
        else:
            sheet.rect(x + 66, level - 21, 110, 42, tone.fill, tone.line)
            sheet.text(x + 121, level + 5, "W_{0}", colour=tone.text, at="middle", italic=True)
        sheet.line([(x + 180, level), (x + 194, level)], SOFT, 1.8)
        sheet.text(x + 204, level - 3, name, bold=True)
        sheet.text(x + 204, level + 16, formula, size=13, colour=SOFT)
        tag(sheet, x + 352, level - 11, "trained" if trained else "frozen", PERSON if trained else BASE)
        sheet.line([(x + 388, level), (x + 404, level)], SOFT, 1.8)
    sheet.line([(x + 404, y), (x + 404, bottom)], SOFT, 1.8)
    sheet.arrow((x + 404, middle), (x + 426, middle))
    sheet.circle(x + 440, middle, 13, PAPER, SOFT, 1.8)
    sheet.text(x + 440, middle + 6, "+", size=18, at="middle")
    sheet.arrow((x + 454, middle), (x + 476, middle))
    sheet.text(x + 490, middle + 6, "y", size=19, italic=True, at="middle")
    return x + 490, middle


def stage_0() -> Sheet:
    """One LoRA on everybody's pooled items."""
    about = "One LoRA learns what people have in common. Later stages train on top of it and are compared with it."
    sheet = Sheet(960, 420, "Stage 0: the task LoRA", about)
    for n, (name, count) in enumerate((("a", 4), ("b", 2), ("c", 3))):
        top = 118 + 58 * n
        person(sheet, 50, top, size=32)
        for item in range(count):
            _item(sheet, 80 + 36 * item, top, f"{name}{item + 1}")
    sheet.arrow((236, 190), (262, 190))
    for n, name in enumerate(("a3", "b1", "c2", "a1", "b2", "c1", "c3", "a2", "a4")):
        _item(sheet, 276 + 36 * (n % 3), 118 + 58 * (n // 3), name)
    sheet.text(40, 318, "items of all people", bold=True)
    sheet.text(276, 318, "one pool", bold=True)
    sheet.text(276, 338, "drawn evenly", size=13, colour=SOFT)
    branch: Branch = ("task LoRA", "s B A x", TASK, 14, ("A", "B"), True)
    branches(sheet, 424, 150, [branch], 84)
    sheet.lines(
        424,
        318,
        ["y = W_{0} x + s B A x", "Loss on the answers alone; W_{0} is never written."],
        colour=SOFT,
        leading=22,
    )
    sheet.line([(32, 362), (928, 362)], LINE)
    words = "Base + task LoRA is the pooled model: it answers for unknown people, and is the baseline to beat."
    sheet.text(32, 390, words)
    return sheet


def _item(sheet: Sheet, x: float, y: float, name: str) -> None:
    sheet.rect(x, y, 28, 34, TEXTS.fill, TEXTS.line, r=4, width=1.2)
    sheet.text(x + 14, y + 22, name, size=12, colour=TEXTS.text, at="middle")


def stage_1() -> Sheet:
    """From histories to a bank."""
    about = "Histories are clustered. The most active person of each cluster is its anchor and trains a meta-LoRA."
    sheet = Sheet(960, 486, "Stage 1: anchors and their bank", about)
    steps = (("1", "Vectors"), ("2", "Clusters"), ("3", "Anchors"), ("4", "Meta-LoRAs"))
    for n, (number, name) in enumerate(steps):
        card(sheet, 24 + 231 * n, 90, 219, 286)
        badge(sheet, 48 + 231 * n, 116, number, name, ANCHOR)
        if n:
            sheet.arrow((8 + 231 * n + 2, 232), (24 + 231 * n, 232), colour=ANCHOR.line, width=2.4)
    _vectors(sheet, 24, 90)
    plane(sheet, 284, 142, 1.15)
    sheet.text(364, 308, "size: number of items", size=12, colour=SOFT, at="middle")
    sheet.lines(
        271,
        340,
        ["k-means over the vectors, at", "most one cluster in four people"],
        size=12.5,
        colour=SOFT,
        leading=18,
    )
    _anchors(sheet, 486, 90)
    _meta_loras(sheet, 717, 90)
    sheet.rect(24, 392, 912, 72, ANCHOR.fill, ANCHOR.line, r=12)
    sheet.text(44, 422, "The bank", size=15, bold=True)
    sheet.text(132, 422, "factors of N anchors, A (N, R, D) and B (N, O, R); their vectors (N, E); the task LoRA")
    sheet.text(
        132,
        446,
        "No text and no id: anchors are numbers, and the people behind the bank are keyed hashes.",
        colour=SOFT,
    )
    return sheet


def _vectors(sheet: Sheet, x: float, y: float) -> None:
    shades = ("#fce6bd", "#f3c15c", "#d08700", "#ffffff")
    for n, pattern in enumerate(((0, 2, 1, 3), (1, 0, 3, 2), (3, 1, 2, 0))):
        top = y + 58 + 58 * n
        person(sheet, x + 30, top, size=30)
        texts(sheet, x + 52, top + 4, 4, w=20, h=26, step=5)
        sheet.arrow((x + 98, top + 16), (x + 120, top + 16))
        for cell, shade in enumerate(pattern):
            sheet.rect(x + 128 + 18 * cell, top + 8, 18, 18, shades[shade], ANCHOR.line, width=1)
    words = ("a history is the mean of its", "encoded items: one unit vector")
    sheet.lines(x + 16, y + 250, words, size=12.5, colour=SOFT, leading=18)


def _anchors(sheet: Sheet, x: float, y: float) -> None:
    for n, items in enumerate((96, 74, 112, 81)):
        top = y + 48 + 44 * n
        person(sheet, x + 32, top, ANCHOR, size=30)
        sheet.rect(x + 60, top + 8, items, 14, TEXTS.fill, TEXTS.line, width=1.2)
        sheet.text(x + 68 + items, top + 20, str(items), size=12, colour=TEXTS.text)
    sheet.lines(
        x + 16,
        y + 250,
        ("most items of its cluster;", "all candidates have over 10"),
        size=12.5,
        colour=SOFT,
        leading=18,
    )


def _meta_loras(sheet: Sheet, x: float, y: float) -> None:
    sheet.rect(x + 54, y + 50, 112, 20, PAPER, ANCHOR.line, dash="4 3")
    sheet.text(x + 110, y + 64.5, "the same A", size=12, colour=ANCHOR.text, at="middle")
    for n in range(4):
        left, top = x + 30 + 92 * (n % 2), y + 98 + 66 * (n // 2)
        if n < 2:
            sheet.arrow((x + 74 + 72 * n, y + 71), (left + 38, y + 92))
        sheet.rect(left, top, 9, 40, ANCHOR.fill, ANCHOR.line)
        sheet.rect(left + 13, top, 46, 9, ANCHOR.fill, ANCHOR.line)
        sheet.text(left + 4, top + 54, f"B_{{{n + 1}}}", size=12, colour=ANCHOR.text, at="middle", italic=True)
        sheet.text(left + 38, top + 25, f"A_{{{n + 1}}}", size=12, colour=ANCHOR.text, at="middle", italic=True)
    words = ("one per anchor, on top of the", "frozen task LoRA; all at once")
    sheet.lines(x + 14, y + 250, words, size=12.5, colour=SOFT, leading=18)


def stage_3() -> Sheet:
    """The stack over everything that is frozen."""
    about = "A LoRA of rank 1, trained on the person's shots on top of the frozen parts, learns what no anchor knows."
    sheet = Sheet(960, 520, "Stage 3: adapt, by a stack", about)
    rows: list[Branch] = [
        ("task LoRA", "s B_{0} A_{0} x", TASK, 14, ("A_{0}", "B_{0}"), False),
        ("merge", "Σ w_{k} s B_{k} A_{k} x", ANCHOR, 26, ("A_{k}", "B_{k}"), False),
        ("stack", "s_{1} b a x", PERSON, 3, ("a", "b"), True),
    ]
    x, y = branches(sheet, 50, 134, rows)
    sheet.arrow((x + 16, y), (x + 46, y))
    card(sheet, x + 54, y - 62, 200, 124)
    sheet.text(x + 154, y - 34, "loss on the answers", at="middle")
    texts(sheet, x + 132, y - 8, 4, w=22, h=28)
    sheet.text(x + 154, y + 46, "of the person's shots", at="middle")
    foot = 134 + 74 * 3 + 46
    sheet.arrow((x + 154, y + 64), (x + 154, foot), (171, foot), (171, foot - 22), colour=PERSON.line, dash="6 4")
    sheet.text(x - 60, foot - 8, "gradient: only to a and b", size=13, colour=PERSON.text, at="middle")
    sheet.line([(32, 426), (928, 426)], LINE)
    note(sheet, 32, 454, "Where", ["in every linear layer", "below the LM head"])
    note(
        sheet,
        232,
        454,
        "What is stored",
        ["a and b: an eighth of a LoRA of rank 8", "(1.2 MB for a base of 135M); and w"],
    )
    note(
        sheet, 560, 454, "What it has to learn", ["only what base, task LoRA and merge", "do not explain of the shots"]
    )
    return sheet
