"""``mta predict``: answer the questions of a file with people's own models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

import mta
from mta.cli import options
from mta.cli.screen import Screen, show_json
from mta.config.constants import SharedModel
from mta.data.history import Item
from mta.data.readers.people import is_read
from mta.errors import InputError
from mta.system.atomic import check_ordinary, make_folder, write_json, write_text

_STORE = "people"
_OTHER = "Give the name of another file:  --out answers.jsonl"


def predict(
    source: options.Source,
    words: options.Words = None,
    bank: options.BankDir = Path("bank"),
    store: options.StoreUrl = _STORE,
    out: Annotated[
        Path | None,
        Option(help="File for answers: JSON lines, or LaMP's outputs if it ends in .json. Default: standard output."),
    ] = None,
    fallback: Annotated[
        SharedModel | None, Option(help="Fallback for people without a model: the pooled model (task), or the base.")
    ] = None,
    history: Annotated[
        str | None,
        Option(help="File of earlier items, if the bank's prompts show history. Default: the store's items."),
    ] = None,
    label_bias: Annotated[
        str | None,
        Option(help="File of people's items: the pooled model answers, with a bias on labels fitted to each person's."),
    ] = None,
    write: Annotated[bool, Option("--write", help="Generate text even if the task has labels.")] = False,
    max_new_tokens: Annotated[
        int | None, Option(min=1, help="Longest answer in tokens; default: the task's answer_tokens.")
    ] = None,
    config: options.Config = None,
    device: options.Device = None,
    columns: options.Columns = None,
    skip_bad: options.SkipBad = None,
    json: options.Json = False,
) -> None:
    """Answer each question of a file with the model of the person who asks.

    A row of SOURCE is a question: person, and input or the task's fields. Answers in SOURCE are not read. A benchmark's
    file gives its own questions. Answers come person by person, in the order of the file. Each line has person,
    question, answer, and, if the task has labels, the share of every label. To resume an interrupted command, repeat it
    with --out. With --history and --fallback task, the pooled model answers from earlier items, without a store. With
    --label-bias, no person's model is asked, and no store is needed.

    Example:  mta predict questions.jsonl --bank bank/ --store people/ --out answers.jsonl
    Example:  mta predict LaMP_3/dev_questions.json --bank bank/ --store people/ --out mine.json
    """
    from mta.tools import predict as tool

    if label_bias and (write or history or fallback):
        hint = "Leave out  --write, --history, and --fallback"
        raise InputError("with --label-bias, the pooled model scores labels", hint=hint)
    _check_files(source, history or label_bias, skip_bad, out)
    task = options.task_of(bank)
    options.check_written(task, write, max_new_tokens)
    people = options.people_in(source, task, columns, skip_bad, questions=True)
    lamp = out is not None and out.suffix == ".json"
    if lamp:
        tool.check_ids(people)
    known = _items_in(history, bank, columns)
    fitted_to = options.people_in(label_bias, task, columns, None) if label_bias else None
    base, opened, run = options.open_bank(bank, words, device=device, config=config)
    unasked = label_bias or (history and fallback)  # no person's model is
    alone = unasked and store == _STORE and not Path(store).exists()
    personal = mta.Personalizer(base, opened, None if alone else store, run=run)
    if out:
        make_folder(out.parent)
    kept = tool.Unfinished(out) if out else None
    with Screen("questions") as screen:
        earlier = None if known is None else lambda person: known.get(person, ())
        biases = None if fitted_to is None else tool.biases_of(personal, fitted_to)
        given = (personal, people, fallback, write, max_new_tokens)
        answers = tool.predict(*given, earlier=earlier, biases=biases, kept=kept, on_step=screen.step)
        predictions = list(answers)
    lines = "".join(f"{dumps(one.as_json(), ensure_ascii=False)}\n" for one in predictions)
    if out is None:
        typer.echo(lines, nl=False)
    elif lamp:
        write_json(out, opened.task.outputs((one.question.id or "", one.answer) for one in predictions))
    else:
        write_text(out, lines)
    if kept is not None:
        kept.remove()
    fallbacks = len({one.person for one in predictions if one.model in ("task", "base")})
    if out and json:
        show_json({"out": str(out), "answers": len(predictions), "people": len(people), "fallback": fallbacks})


def _check_files(source: str, history: str | None, skip_bad: Path | None, out: Path | None) -> None:
    """Raise InputError if a file would be written that is read, or ``out`` cannot be written."""
    earlier = Path(os.path.expanduser(history)) if history else None
    if earlier and skip_bad and is_read(skip_bad, earlier):
        hint = "Name another file:  --skip-bad bad.jsonl"
        raise InputError(f"{skip_bad} is also the file of earlier items", hint=hint)
    if out is None:
        return
    if out.is_dir():
        raise InputError(f"{out} is a folder", hint=_OTHER)
    check_ordinary(out)
    read = [Path(os.path.expanduser(source)), *([earlier] if earlier else [])]
    if any(is_read(out, one) for one in read) or (skip_bad and out.resolve() == skip_bad.resolve()):
        raise InputError(f"{out} is also the file of questions, their answers, or bad rows", hint=_OTHER)
    options.check_out(out.parent)


def _items_in(history: str | None, bank: Path, columns: Sequence[str] | None) -> dict[str, tuple[Item, ...]] | None:
    """Return people's earlier items from a file, if there is one, before a base is loaded.

    Raises InputError for a bank whose prompts show none.
    """
    from mta.bank.format import read_info

    if history is None:
        return None
    if not read_info(bank).run.task_lora.history:
        raise InputError("this bank's prompts show no earlier items", hint="Build one with  task_lora.history=8")
    people = options.people_in(history, options.task_of(bank), columns, None)
    return {person.id: person.items for person in people}
