"""``mta personalize``: stages 2 and 3 for everybody in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mta.cli.data import Source, people_in
from mta.cli.options import (
    MERGE_AND_STACK,
    BankDir,
    Config,
    Device,
    Json,
    Seed,
    SkipBad,
    StoreUrl,
    Words,
    open_bank,
    show_json,
    task_of,
)


def personalize(
    source: Source,
    words: Words = None,
    bank: BankDir = Path("bank"),
    store: StoreUrl = "people",
    latest: Annotated[
        int | None, typer.Option(min=1, help="Use only the most recent so many items of each person.")
    ] = None,
    keep_histories: Annotated[
        bool, typer.Option("--keep-histories", help="Keep people's items in the store, until they are forgotten.")
    ] = False,
    config: Config = None,
    seed: Seed = None,
    device: Device = None,
    skip_bad: SkipBad = None,
    resume: Annotated[bool, typer.Option("--resume/--restart", help="Go on with cohorts that were stopped.")] = True,
    json: Json = False,
) -> None:
    """Give everybody in a file their merge and their stack, all of them together.

    People whose state is up to date are left alone: repeat the command at will.

    Example:  mta personalize newcomers.jsonl --bank bank/ --store people/
    """
    from dataclasses import asdict

    from mta.cli.screen import Screen
    from mta.personalize import Personalizer

    people = people_in(source, task_of(bank), skip_bad)
    if latest is not None:
        people = [person.latest(latest) for person in people]
    base, opened, run = open_bank(bank, words, seed, device, config, open_to=MERGE_AND_STACK)
    if seen := sum(bool(opened.info.members.artefacts_of(person.id)) for person in people):
        typer.echo(f"{seen} of {len(people)} people helped to train this bank: it knows their items already.", err=True)
    personal = Personalizer(base, opened, store, run=run)
    with Screen() as screen:
        done = personal.personalize(people, keep_histories=keep_histories, resume=resume, on_step=screen.step)
    if json:
        return show_json(asdict(done))
    typer.echo(
        f"{done.trained} people personalized, {done.unchanged} were up to date; {done.shortened} texts were shortened"
    )
