"""``mta generate``: answer one question for several people in one batch."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mta.cli.options import BankDir, Config, Device, Json, Seed, StoreUrl, Words, open_bank, show_json

if TYPE_CHECKING:
    from mta.personalize.adapters import Who
    from mta.personalize.personalizer import Question


def generate(
    question: Annotated[
        str, typer.Argument(help='The question: a text, or fields as JSON: {"title": …, "genres": …}.')
    ],
    words: Words = None,
    person: Annotated[list[str] | None, typer.Option(help="Person id; repeat the option for several people.")] = None,
    bank: BankDir = Path("bank"),
    store: StoreUrl = "people",
    write: Annotated[
        bool,
        typer.Option("--write", help="Generate text even if the task has labels."),
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens; default: the task's answer_tokens.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 decodes greedily.")] = 0.0,
    nobody: Annotated[bool, typer.Option("--nobody", help="Also ask the pooled model and the base.")] = False,
    config: Config = None,
    seed: Seed = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Ask several people's models the same question, in one batch.

    If the task has labels, every label is scored, as in mta evaluate: the answer is the most likely label, and the
    shares of all labels are shown. Otherwise the answer is generated token by token.

    Example:  mta generate "Great sound, weak battery." --person ann --person bob --nobody
    """
    from mta.personalize import Personalizer
    from mta.personalize.adapters import BASE, TASK

    asked = _fields(question)
    base, opened, run = open_bank(bank, words, seed, device, config)
    personal = Personalizer(base, opened, store, run=run)
    people: list[Who] = [*(person or []), *([TASK, BASE] if nobody or not person else [])]
    rows = [(who, asked) for who in people]
    names = [who if isinstance(who, str) else f"({who.value})" for who in people]
    if opened.task.labelled and not write:
        return _show_shares(names, personal.shares(rows), json)
    answers = personal.generate(rows, max_new_tokens=max_new_tokens, temperature=temperature)
    if json:
        return show_json([{"person": name, "answer": answer} for name, answer in zip(names, answers)])
    for name, answer in zip(names, answers):
        typer.echo(f"{name}: {answer}")


def _show_shares(names: list[str], shares: list[dict[str, float]], json: bool) -> None:
    if json:
        return show_json(
            [{"person": name, "answer": next(iter(own)), "shares": own} for name, own in zip(names, shares)]
        )
    for name, own in zip(names, shares):
        typer.echo(f"{name}: {next(iter(own))}   " + "  ".join(f"{label} {share:.0%}" for label, share in own.items()))


def _fields(question: str) -> Question:
    from mta.data.readers.rejects import Bad
    from mta.data.readers.rows import text_in
    from mta.errors import DataError

    if question.lstrip().startswith("{"):
        try:
            fields = json_module.loads(question)
        except ValueError:
            return question
        try:
            return {name: text_in(fields, name) for name in fields}
        except Bad as bad:
            raise DataError(
                f"the question's field {bad.field!r}: {bad.reason}",
                hint='Give each field a text, for example \'{"title": "Heat", "genres": "Crime"}\'.',
            ) from None
    return question
