"""``mta evaluate``: are people better off? Every method on the same shots and the same later queries."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from mta.cli.data import Source, people_in
from mta.cli.options import (
    MERGE_AND_STACK,
    OF_THE_MACHINE,
    BankDir,
    Device,
    Json,
    Seed,
    SkipBad,
    Words,
    check_out,
    open_bank,
    show_json,
    task_of,
    typed,
)

Settings = Annotated[Path | None, typer.Option("--config", help="Evaluation settings in YAML.", dir_okay=False)]
Predictions = Annotated[
    Path | None, typer.Option(help="Score this file of answers instead, made elsewhere.", dir_okay=False)
]


def evaluate(
    source: Source,
    words: Words = None,
    bank: BankDir = Path("bank"),
    out: Annotated[Path | None, typer.Option(help="Folder for report.html and results.json.")] = None,
    config: Settings = None,
    predictions: Predictions = None,
    task: Annotated[str | None, typer.Option(help="The task of --predictions; else it is the bank's.")] = None,
    people: Annotated[int | None, typer.Option(min=1, help="Only so many people, drawn by the seed.")] = None,
    seed: Seed = None,
    device: Device = None,
    skip_bad: SkipBad = None,
    json: Json = False,
) -> None:
    """Compare MTA with constants, the base, the task LoRA, OPPU, merge only and adapt only.

    Everything is made anew from the shots; states in a store are not looked at. People who are in the bank, or have
    fewer than shots + queries items, are left out. Settings as key=value are those of the evaluation (shots=4
    queries=10), and merge.…, stack.…, memory and dtype over the bank's.

    With --predictions nothing is computed: a file of answers in LaMP's format is scored as the benchmark does it.

    Example:  mta evaluate newcomers.jsonl --bank bank/ --out results/ shots=8 queries=12 merge.policy=ridge
    Example:  mta evaluate dev_outputs.json --predictions mine.json --task lamp3
    """
    if predictions:
        return _score(source, predictions, task, words, json)
    from mta.cli.screen import Screen, console
    from mta.config import Evaluation, load_settings
    from mta.errors import InputError
    from mta.evaluation.report import to_json
    from mta.evaluation.show import show
    from mta.evaluation.study import study

    if task:
        raise InputError("--task belongs to --predictions; a comparison is about the task of its bank")
    of_run = [word for word in words or () if re.split("[.=]", word)[0] in MERGE_AND_STACK | OF_THE_MACHINE]
    check_out(out)
    chosen = load_settings(Evaluation, config, [word for word in words or () if word not in of_run])
    everybody = people_in(source, task_of(bank), skip_bad)
    base, opened, run = open_bank(bank, of_run, seed, device, open_to=MERGE_AND_STACK)
    with Screen() as screen:
        found = study(base, opened, run, everybody, chosen, limit=people, on_step=screen.step, on_method=screen.say)
    if json:
        show_json(to_json(found.comparison, **found.meta, command=typed()))
    else:
        show(found, console)
    if out:
        found.write(out, typed())


def _score(source: str, predictions: Path, task: str | None, words: list[str] | None, json: bool) -> None:
    from mta.assets import resolve
    from mta.errors import InputError
    from mta.evaluation.lamp import score
    from mta.readers import read_answers
    from mta.tasks import load_task

    if words or not task:
        raise InputError(
            "--predictions needs the task, and takes no settings",
            hint="For example --predictions mine.json --task lamp3.",
        )
    asked = load_task(task)
    golds = read_answers(Path(resolve(source)), asked)
    found = score(asked, read_answers(predictions, asked, empty=True), golds)
    if json:
        show_json(found | {"questions": len(golds)})
    else:
        typer.echo("  ".join(f"{metric} {value:.4f}" for metric, value in found.items()) + f"  questions {len(golds)}")
