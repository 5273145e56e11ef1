"""``mta compare``: what a bank gains for people."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Generic, TypeVar

import typer
from typer import Option

import mta
from mta.cli import options, screen
from mta.cli.screen import Screen, show_json
from mta.config import CompareSettings, Run, override
from mta.config.loader import Settings
from mta.data.history import Person
from mta.system.extras import require

if TYPE_CHECKING:
    from mta.tracking.run_folder import RunFolder

Kind = TypeVar("Kind", bound=Settings)
RUN_SETTINGS = options.MERGE_AND_STACK | options.MACHINE_SETTINGS
Out = Annotated[Path | None, Option(help="Folder for report.html, results.json and the run's settings.")]


def compare(
    source: options.Source,
    words: options.Words = None,
    bank: options.BankDir = Path("bank"),
    out: Out = None,
    config: options.Config = None,
    people: Annotated[int | None, Option(min=1, help="Maximum number of people to test, drawn with the seed.")] = None,
    seed: options.Seed = None,
    device: options.Device = None,
    columns: options.Columns = None,
    skip_bad: options.SkipBad = None,
    json: options.Json = False,
) -> None:
    """On people outside the bank, compare MTA with constants, base, task LoRA, merges, and rivals without a bank.

    Each person of SOURCE is personalized anew from the shots. People in the bank, and people with fewer than shots +
    queries items, are left out. key=value sets the comparison (shots=4 queries=10) and overrides merge.…, stack.…,
    memory and dtype of the bank.

    Example:  mta compare newcomers.jsonl --bank bank/ --out results/ shots=8 queries=12 merge.policy=posterior
    """
    require("eval")  # before a model is loaded
    command, given = options.command_line(), (source, words, bank, out, config, seed, device, columns, skip_bad)
    with opened("comparison", CompareSettings, *given) as session:
        measured, say = (session.base, session.bank, session.people, session.settings), session.screen.say
        step = session.folder.step
        report = mta.compare(*measured, run=session.run, limit=people, on_step=step, on_method=say)
        session.folder.outcome = report.outcome()
        if out:
            report.write(out, command)
    from mta.evaluation.reports import tables
    from mta.evaluation.reports.html import to_json

    if json:
        return show_json(to_json(report.comparison, **report.meta, command=command))
    tables.show(report.comparison, report.meta, screen.tables())
    if out:
        typer.echo(f"Report: {out / 'report.html'}; what follows from it: docs/how-to/decide.md", err=True)


@dataclass
class Session(Generic[Kind]):
    """A bank and people, ready to be measured."""

    base: mta.BaseModel
    bank: mta.Bank
    run: Run
    people: list[Person]
    settings: Kind
    screen: Screen
    folder: RunFolder


@contextmanager
def opened(
    kind: str,
    settings: type[Kind],
    source: str,
    words: list[str] | None,
    bank_folder: Path,
    out: Path | None,
    config: Path | None,
    seed: int | None,
    device: str | None,
    columns: list[str] | None,
    skip_bad: Path | None,
) -> Iterator[Session[Kind]]:
    """Read the people and the settings, open the bank, and yield all with the folder of the run."""
    options.check_out(out)
    people = options.people_in(source, options.task_of(bank_folder), columns, skip_bad)
    run_words = [word for word in words or () if re.split("[.=]", word)[0] in RUN_SETTINGS]
    own_words = [word for word in words or () if word not in run_words]
    chosen = override(settings(), own_words, config, beside=RUN_SETTINGS)
    base, bank, run = options.open_bank(
        bank_folder,
        run_words,
        seed=seed,
        device=device,
        config=config,
        beside=settings.model_fields,
        open_to=options.MERGE_AND_STACK,
    )
    used = chosen.model_dump(mode="json") | base.as_loaded(run).model_dump(mode="json", include=set(RUN_SETTINGS))
    with Screen() as screen, options.run_folder(kind, out, base, bank, used, screen.step) as folder:
        yield Session(base, bank, run, people, chosen, screen, folder)
