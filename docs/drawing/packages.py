"""Drawings of the package: the path of a person's text through the modules, and the server."""

from __future__ import annotations

from collections.abc import Sequence

from drawing.glyphs import card, person, texts
from drawing.ink import ANCHOR, BASE, GROUND, INK, PAPER, PERSON, SOFT, TASK, TEXTS, Sheet, Tone

COLUMNS = (44, 272, 500, 728)
WIDE, HIGH = 172, 84


def box(sheet: Sheet, column: int, y: float, name: str, files: Sequence[str], tone: Tone = BASE) -> None:
    """Draw a box: a step and its files in src/mta."""
    x = COLUMNS[column]
    sheet.rect(x, y, WIDE, HIGH, PAPER, tone.line, r=8)
    sheet.text(x + 14, y + 26, name, size=14, bold=True)
    sheet.lines(x + 14, y + 48, files, size=12.5, colour=tone.text, leading=18)


def between(sheet: Sheet, column: int, y: float, words: str, *, back: bool = False) -> None:
    """Draw a labeled arrow from the box of a column to the next box, or back."""
    x = COLUMNS[column] + WIDE
    ends = (x + 2, y + HIGH / 2 + 12), (x + 54, y + HIGH / 2 + 12)
    sheet.arrow(*(reversed(ends) if back else ends))
    sheet.text(x + 28, y + HIGH / 2, words, size=11.5, colour=INK, at="middle")


def band(sheet: Sheet, y: float, h: float, name: str, fill: str = GROUND, colour: str = SOFT, x: float = 44) -> None:
    """Draw the labeled background of a row of boxes."""
    sheet.rect(24, y, 912, h, fill, r=12)
    sheet.text(x, y + 24, name, size=13, colour=colour, bold=True)


def architecture() -> Sheet:
    """Draw the path of a person's text."""
    about = "Boxes are modules of src/mta. Labels on arrows name the data. Data moves in one direction."
    sheet = Sheet(960, 806, "The path of a person's text", about)
    band(sheet, 88, 132, "In memory: people's texts", TEXTS.fill, TEXTS.text)
    box(sheet, 0, 124, "Read", ["data/readers/"], TEXTS)
    box(sheet, 1, 124, "History", ["data/history.py", "data/splits.py"], TEXTS)
    box(sheet, 2, 124, "Tokenize", ["data/tasks/task.py", "data/tasks/prompt.py"], TEXTS)
    between(sheet, 0, 124, "items")
    between(sheet, 1, 124, "shots")
    _come_in(sheet)
    _stages(sheet)
    _border(sheet, 416)
    _disk(sheet)
    _answers(sheet)
    return sheet


def _come_in(sheet: Sheet) -> None:
    texts(sheet, 748, 140, 4)
    sheet.lines(802, 142, ["files, or items", "sent by HTTP"], size=12.5, colour=TEXTS.text, leading=18)
    sheet.lines(748, 188, ["ids and texts of people"], size=12.5, colour=TEXTS.text)


def _stages(sheet: Sheet) -> None:
    """Draw stages 2 and 3: from texts and tokens to numbers."""
    band(sheet, 248, 140, "In memory: vectors, tokens, tensors of one cohort (personalize/stages.py)", x=84)
    box(sheet, 0, 288, "Encode", ["model/encoders.py"])
    box(sheet, 1, 288, "Retrieve", ["bank/bank.py"], ANCHOR)
    box(
        sheet,
        2,
        288,
        "Merge (stage 2)",
        ["personalize/policies.py", "personalize/merge.py"],
        ANCHOR,
    )
    box(sheet, 3, 288, "Adapt (stage 3)", ["personalize/stages.py", "training/, lora/"], PERSON)
    between(sheet, 0, 288, "vector")
    between(sheet, 1, 288, "cosines")
    between(sheet, 2, 288, "ids, w")
    sheet.arrow((540, 210), (540, 236), (64, 236), (64, 286), colour=TEXTS.line)
    sheet.text(300, 231, "texts", size=12, colour=TEXTS.text, at="middle")
    sheet.arrow((586, 210), (586, 286), colour=TEXTS.line)
    sheet.arrow((586, 236), (814, 236), (814, 286), colour=TEXTS.line)
    sheet.text(700, 231, "tokens", size=12, colour=TEXTS.text, at="middle")


def _border(sheet: Sheet, y: float) -> None:
    sheet.line([(24, y), (936, y)], TEXTS.line, 2.5, "9 6")
    sheet.rect(444, y - 15, 346, 30, PAPER, TEXTS.line, r=15)
    sheet.text(617, y + 5, "No texts below: stored files hold none", colour=TEXTS.text, at="middle", bold=True)


def _disk(sheet: Sheet) -> None:
    """Draw the files of a person and of the bank."""
    band(sheet, 444, 136, "On disk: numbers, digests, and keyed hashes")
    box(sheet, 1, 482, "The bank's folder", ["bank/build.py writes it", "bank/format.py checks it"], ANCHOR)
    box(sheet, 2, 482, "Store", ["store/store.py", "system/storage.py"], PERSON)
    box(sheet, 3, 482, "State", ["store/state.py"], PERSON)
    between(sheet, 2, 482, "bytes", back=True)
    sheet.arrow((814, 374), (814, 480), colour=PERSON.line)
    sheet.lines(822, 398, ["ids, w,"], size=12, colour=PERSON.text)
    sheet.lines(822, 440, ["stack, losses"], size=12, colour=PERSON.text)
    sheet.arrow((420, 480), (420, 374), colour=ANCHOR.line)
    sheet.lines(
        44,
        506,
        ["Exception:", "the store keeps histories", "on request, until the", "person is forgotten."],
        size=12.5,
        colour=SOFT,
    )


def _answers(sheet: Sheet) -> None:
    """Draw how stored files become answers."""
    band(sheet, 616, 168, "In memory: questions in, answers out", TEXTS.fill, TEXTS.text, x=84)
    box(sheet, 0, 656, "Adapters per row", ["personalize/adapters.py"], PERSON)
    box(sheet, 1, 656, "Generate, score", ["model/generate.py", "training/scoring.py"], TEXTS)
    box(sheet, 2, 656, "Evaluate", ["evaluation/"], TEXTS)
    box(sheet, 3, 656, "Serve", ["serving/"], TEXTS)
    between(sheet, 0, 656, "adapters")
    between(sheet, 1, 656, "answers")
    sheet.line([(358, 566), (358, 600)], ANCHOR.line, 1.8)
    sheet.line([(586, 566), (586, 600)], PERSON.line, 1.8)
    sheet.arrow((586, 600), (64, 600), (64, 654), colour=SOFT)
    sheet.arrow((586, 600), (814, 600), (814, 654), colour=SOFT)
    sheet.text(472, 593, "bank, ids, w, stack", size=12, colour=INK, at="middle")
    words = "To protect: answers in experiment folders, rows in --skip-bad files. Logs and metrics hold no text."
    sheet.text(44, 766, words, size=12.5, colour=TEXTS.text)


def serving() -> Sheet:
    """Draw the gateway and its two engines."""
    about = "The gateway checks keys and rights. Either engine behind it answers different people in one batch."
    sheet = Sheet(960, 640, "Serving all people from one base", about)
    _callers(sheet)
    _gateway(sheet)
    _embedded(sheet)
    _vllm(sheet)
    for x, w, name, words, tone in (
        (212, 348, "Store", "states of people; histories on request", PERSON),
        (580, 356, "Bank", "meta-LoRAs of the anchors, task LoRA", ANCHOR),
    ):
        sheet.rect(x, 544, w, 72, tone.fill, tone.line, r=12)
        sheet.text(x + 20, 574, name, size=15, bold=True)
        sheet.text(x + 20, 597, words, size=13)
    sheet.arrow((330, 542), (330, 512), colour=PERSON.line)
    sheet.arrow((356, 512), (356, 542), colour=PERSON.line)
    sheet.arrow((538, 542), (538, 512), colour=PERSON.line)
    sheet.arrow((758, 542), (758, 512), colour=ANCHOR.line)
    return sheet


def _callers(sheet: Sheet) -> None:
    rows = (("ann", "her own key", PERSON), ("an app", "rights: serve", BASE), ("operator", "rights: admin", BASE))
    for n, (who, key, tone) in enumerate(rows):
        y = 142 + 112 * n
        person(sheet, 84, y, tone, size=38)
        sheet.text(84, y + 57, who, bold=True, at="middle")
        sheet.text(84, y + 75, key, size=12.5, colour=SOFT, at="middle")
        sheet.arrow((142, y + 22), (208, y + 22))
    sheet.text(175, 152, "OpenAI's", size=12, colour=SOFT, at="middle")
    sheet.text(175, 184, "API", size=12, colour=SOFT, at="middle")


def _gateway(sheet: Sheet) -> None:
    card(sheet, 212, 90, 260, 420, GROUND)
    sheet.text(232, 118, "Gateway", size=16, bold=True)
    sheet.text(452, 118, "FastAPI", size=13, colour=SOFT, at="end")
    rows = (
        ("Keys and rights", "auth.py"),
        ("Limits on requests", "limits.py"),
        ("Model names", "model_names.py, service.py"),
        ("Chat, completions", "completions.py, streaming.py"),
        ("People: items, state, forget", "people.py, histories.py"),
        ("Background: stages 2 and 3", "jobs.py"),
    )
    for n, (name, file) in enumerate(rows):
        y = 134 + 62 * n
        sheet.rect(228, y, 228, 52, PAPER, PERSON.line if n == 5 else SOFT, r=8, width=1.2)
        sheet.text(240, y + 21, name, size=13, bold=True)
        sheet.text(240, y + 41, file, size=12.5, colour=SOFT)


def _embedded(sheet: Sheet) -> None:
    card(sheet, 516, 90, 420, 236, GROUND)
    sheet.arrow((474, 200), (514, 200))
    sheet.text(536, 118, "Embedded engine", size=16, bold=True)
    sheet.text(916, 118, "engine.py, scheduler.py", size=12.5, colour=SOFT, at="end")
    sheet.text(655, 146, "KV slot", size=12, colour=SOFT, at="middle")
    sheet.text(775, 146, "adapter slot", size=12, colour=SOFT, at="middle")
    rows = (
        ("ann", 60, (8, 22, 4, 14), True),
        ("bob", 34, (18, 3, 9, 6), True),
        ("ann#merged", 48, (8, 22, 4, 14), False),
        ("task", 22, (), False),
    )
    for n, (who, filled, gates, stack) in enumerate(rows):
        y = 154 + 36 * n
        sheet.text(610, y + 20, who, size=12.5, colour=PERSON.text if gates else TASK.text, at="end")
        sheet.rect(618, y, 88, 29, PAPER, TEXTS.line, width=1.2)
        sheet.rect(618, y, filled, 29, TEXTS.fill, TEXTS.line, width=1.2)
        sheet.rect(722, y, 88, 29, PAPER, PERSON.line, width=1.2)
        for k, gate in enumerate(gates):
            sheet.rect(728 + 12 * k, y + 26 - gate, 8, gate, PERSON.fill, PERSON.line, width=1)
        if stack:
            sheet.rect(778, y + 4, 4, 21, PERSON.fill, PERSON.line, width=1)
            sheet.rect(785, y + 4, 20, 4, PERSON.fill, PERSON.line, width=1)
        sheet.line([(812, y + 14), (832, y + 14), (832, 223)], SOFT)
    sheet.arrow((832, 223), (850, 223))
    sheet.rect(854, 176, 68, 94, BASE.fill, BASE.line, r=6)
    sheet.lines(888, 206, ["one pass", "of one", "base"], size=12.5, at="middle", leading=20, colour=BASE.text)
    sheet.text(536, 314, "A KV slot is reused only by the same person, version, and caller.", size=12.5, colour=SOFT)


def _vllm(sheet: Sheet) -> None:
    card(sheet, 516, 350, 420, 160, GROUND)
    sheet.text(726, 342, "or", size=13, bold=True, at="middle", colour=SOFT)
    sheet.arrow((474, 430), (514, 430))
    sheet.text(536, 378, "vLLM with our plugin", size=16, bold=True)
    sheet.text(916, 378, "engine.py", size=12.5, colour=SOFT, at="end")
    steps = (("a name", "registry.py"), ("resolver", "resolver.py"), ("adapter", "adapters.py"))
    for n, (name, file) in enumerate(steps):
        x = 532 + 134 * n
        sheet.rect(x, 394, 120, 54, PAPER, SOFT, r=8, width=1.2)
        sheet.text(x + 60, 416, name, size=12, bold=True, at="middle")
        sheet.text(x + 60, 436, file, size=11.5, colour=SOFT, at="middle")
        if n:
            sheet.arrow((x - 13, 421), (x - 1, 421))
    sheet.text(536, 474, "A separate process. Task LoRA, merge, and stack become one", size=12.5, colour=SOFT)
    sheet.text(536, 492, "adapter of the slots' rank, in memory, on the first request.", size=12.5, colour=SOFT)
