"""``mta personalize``: run stages 2 and 3 for all people in a file."""

from __future__ import annotations

from functools import partial
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
    Track,
    Words,
    Workers,
    executor_at,
    kept_over,
    open_bank,
    show_json,
    task_of,
    tracked,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mta.bank.bank import Bank
    from mta.data.history import Person
    from mta.personalize.pipeline import Personalized, Updated

    Compute = Callable[..., Personalized | Updated]

Latest = Annotated[int | None, typer.Option(min=1, help="Use only this many most recent items of each person.")]
KeepHistories = Annotated[
    bool, typer.Option("--keep-histories", help="Keep people's items in the store until they are forgotten.")
]
Update = Annotated[
    bool, typer.Option("--update", help="Update existing states, at the cost of each person's new items.")
]
RunDir = Annotated[
    Path | None, typer.Option("--run", help="Folder for this run's settings and metrics, for mta report.")
]
Resume = Annotated[bool, typer.Option("--resume/--restart", help="Resume interrupted cohorts, or start over.")]


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
    run: RunDir = None,
    track: Track = None,
    json: Json = False,
) -> None:
    """Compute the merge and train the stack of all people in a file, in cohorts.

    People whose states are up to date are skipped, so the command can be repeated. With --update, states of people
    with new items are updated: kept, or trained on the new items only.

    Example:  mta personalize newcomers.jsonl --bank bank/ --store people/
    Example:  mta personalize everybody.jsonl --bank bank/ --store s3://bucket/people --cluster ray://head:10001
    """
    from mta.cli.screen import Screen
    from mta.errors import InputError
    from mta.personalize import Personalizer
    from mta.personalize.pipeline import counts
    from mta.store import Store
    from mta.tracking.run_folder import work_of

    if update and not resume:
        raise InputError(
            "--restart was given with --update, which leaves no interrupted cohorts", hint="Leave --restart out."
        )
    opener, since = tracked(track, run), Store(store).tombstones.names()  # read before the source
    people = [p.latest(latest) if latest else p for p in people_in(source, task_of(bank), skip_bad)]
    base, opened, settings = open_bank(bank, words, seed, device, config, open_to=MERGE_AND_STACK)
    _warn_of_members(opened, people)
    with executor_at(cluster, workers, together) as executor, Screen() as screen:
        personal = Personalizer(base, opened, store, run=settings, executor=executor)
        asked = base.as_loaded(settings).model_dump(mode="json")
        work = work_of(asked, opened.hash, sorted(p.digest() for p in people))  # so that `run` can be continued
        with kept_over("personalize", base, opened, asked, run, track=opener, on_step=screen.step, work=work) as kept:
            compute: Compute = personal.update if update else partial(personal.personalize, resume=resume)
            done = compute(people, keep_histories=keep_histories, since=since, on_step=kept.step)
            kept.outcome, kept.about["plan"] = counts(done), done.plan
    _tell(done, json)


def _warn_of_members(bank: Bank, people: Sequence[Person]) -> None:
    if bank.info.members.hashed is None:
        typer.echo("This bank came without its members: these people may have helped to train it.", err=True)
    if seen := sum(bool(bank.info.members.artefacts_of(person.id)) for person in people):
        typer.echo(f"{seen} of {len(people)} people helped to train this bank, so it has seen their items.", err=True)


def _tell(done: Personalized | Updated, json: bool) -> None:
    from dataclasses import asdict

    show_json(asdict(done)) if json else typer.echo(str(done))
    if done.forgotten:
        typer.echo(f"forgotten meanwhile, so nothing was saved for them: {len(done.forgotten)} people", err=True)
    for person, error in done.failed.items():
        typer.echo(f"not personalized: {person!r}: {error}", err=True)
    if done.failed:
        raise typer.Exit(1)
