"""``mta generate``: answer one question for several people in one batch."""

from __future__ import annotations

from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

import mta
from mta.cli import options
from mta.cli.screen import show_json
from mta.data.readers.rejects import Bad
from mta.data.readers.rows import text_in
from mta.errors import DataError

if TYPE_CHECKING:
    from mta.personalize.adapters import Who
    from mta.personalize.personalizer import Question


def generate(
    question: Annotated[str, Argument(help='The question: a text, or fields as JSON: {"title": …, "genres": …}.')],
    words: options.Words = None,
    person: Annotated[list[str] | None, Option(help="Person id; repeat the option for several people.")] = None,
    bank: options.BankDir = Path("bank"),
    store: options.StoreUrl = "people",
    write: Annotated[bool, Option("--write", help="Generate text even if the task has labels.")] = False,
    max_new_tokens: Annotated[
        int | None, Option(min=1, help="Longest answer in tokens; default: the task's answer_tokens.")
    ] = None,
    temperature: Annotated[float, Option(min=0.0, help="Sampling temperature; 0 decodes greedily.")] = 0.0,
    nobody: Annotated[bool, Option("--nobody", help="Also ask the pooled model and the base.")] = False,
    config: options.Config = None,
    seed: options.Seed = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Ask several people's models the same question, in one batch.

    If the task has labels, every label is scored, as in mta evaluate: the answer is the most likely label, and the
    shares of all labels are shown. Otherwise the answer is generated token by token.

    Example:  mta generate "Great sound, weak battery." --person ann --person bob --nobody
    """
    asked = _fields(question)
    base, opened, run = options.open_bank(bank, words, seed, device, config)
    personal = mta.Personalizer(base, opened, store, run=run)
    people: list[Who] = [*(person or []), *([mta.TASK, mta.BASE] if nobody or not person else [])]
    rows = [(who, asked) for who in people]
    names = [who if isinstance(who, str) else f"({who.value})" for who in people]
    if opened.task.labelled and not write:
        shares = personal.shares(rows)
        answers = [next(iter(own)) for own in shares]
        details = ["   " + "  ".join(f"{label} {share:.0%}" for label, share in own.items()) for own in shares]
        more: list[dict[str, object]] = [{"shares": own} for own in shares]
    else:
        answers = personal.generate(rows, max_new_tokens=max_new_tokens, temperature=temperature)
        details, more = [""] * len(rows), [{}] * len(rows)
    if json:
        found = zip(names, answers, more)
        return show_json([{"person": name, "answer": answer, **added} for name, answer, added in found])
    for name, answer, detail in zip(names, answers, details):
        typer.echo(f"{name}: {answer}{detail}")


def _fields(question: str) -> Question:
    """Return the fields of a question that is a JSON object; another text unchanged. Raises DataError."""
    if not question.lstrip().startswith("{"):
        return question
    try:
        fields = loads(question)
    except ValueError:
        return question
    try:
        return {name: text_in(fields, name) for name in fields}
    except Bad as bad:
        raise DataError(
            f"the question's field {bad.field!r}: {bad.reason}",
            hint='Give each field a text, for example \'{"title": "Heat", "genres": "Crime"}\'.',
        ) from None
