"""``mta personalize``: stages 2 and 3 for everybody in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mta.cli.data import Source, people_in
from mta.cli.options import (
    MERGE_AND_STACK,
    BankDir,
    ClusterAt,
    Config,
    Device,
    Json,
    Seed,
    SkipBad,
    StoreUrl,
    Together,
    Words,
    Workers,
    executor_at,
    open_bank,
    show_json,
    task_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mta.bank.bank import Bank
    from mta.history import Person
    from mta.making import Personalized, Updated

Latest = Annotated[int | None, typer.Option(min=1, help="Use only the most recent so many items of each person.")]
KeepHistories = Annotated[
    bool, typer.Option("--keep-histories", help="Keep people's items in the store, until they are forgotten.")
]
Update = Annotated[
    bool, typer.Option("--update", help="Go on from the states there are, at the cost of each person's new items.")
]
Resume = Annotated[bool, typer.Option("--resume/--restart", help="Go on with cohorts that were stopped.")]


def personalize(
    source: Source,
    words: Words = None,
    bank: BankDir = Path("bank"),
    store: StoreUrl = "people",
    latest: Latest = None,
    keep_histories: KeepHistories = False,
    update: Update = False,
    config: Config = None,
    seed: Seed = None,
    device: Device = None,
    skip_bad: SkipBad = None,
    resume: Resume = True,
    cluster: ClusterAt = None,
    workers: Workers = None,
    together: Together = None,
    json: Json = False,
) -> None:
    """Give everybody in a file their merge and their stack, all of them together.

    People whose state is up to date are left alone: repeat the command at will. With --update people whose histories
    have grown are gone on with from their states: kept, or trained on the new items alone.

    Example:  mta personalize newcomers.jsonl --bank bank/ --store people/
    Example:  mta personalize everybody.jsonl --bank bank/ --store s3://bucket/people --cluster ray://head:10001
    """
    from dataclasses import asdict

    from mta.cli.screen import Screen
    from mta.personalize import Personalizer

    people = [p.latest(latest) if latest else p for p in people_in(source, task_of(bank), skip_bad)]
    base, opened, run = open_bank(bank, words, seed, device, config, open_to=MERGE_AND_STACK)
    _tell_of_members(opened, people)
    with executor_at(cluster, workers, together) as executor, Screen() as screen:
        personal = Personalizer(base, opened, store, run=run, executor=executor)
        if update:
            done: Personalized | Updated = personal.update(people, keep_histories=keep_histories, on_step=screen.step)
        else:
            done = personal.personalize(people, keep_histories=keep_histories, resume=resume, on_step=screen.step)
    show_json(asdict(done)) if json else typer.echo(str(done))
    for person, error in done.failed.items():
        typer.echo(f"not personalized: {person!r}: {error}", err=True)
    if done.failed:
        raise typer.Exit(1)


def _tell_of_members(bank: Bank, people: Sequence[Person]) -> None:
    if bank.info.members.hashed is None:
        typer.echo(
            "This bank came without its members: whether these people helped to train it is not known.", err=True
        )
    if seen := sum(bool(bank.info.members.artefacts_of(person.id)) for person in people):
        typer.echo(f"{seen} of {len(people)} people helped to train this bank: it knows their items already.", err=True)
