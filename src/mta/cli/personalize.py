"""``mta personalize``: run stages 2 and 3 for all people in a file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

import mta
from mta.cli import options
from mta.cli.screen import Screen, show_json
from mta.errors import InputError
from mta.system.atomic import json_sha256

if TYPE_CHECKING:
    from mta.personalize.outcomes import Personalized, Updated


def personalize(
    source: options.Source,
    words: options.Words = None,
    bank: options.BankDir = Path("bank"),
    store: options.StoreUrl = "people",
    latest: Annotated[int | None, Option(min=1, help="Number of latest items to use per person.")] = None,
    keep_histories: Annotated[
        bool,
        Option(
            "--keep-histories",
            help="Store all items of the file, replacing stored items. Forgetting a person removes the items.",
        ),
    ] = False,
    update: Annotated[
        bool, Option("--update", help="Update existing states: compute only each person's new items.")
    ] = False,
    config: options.Config = None,
    seed: options.Seed = None,
    device: options.Device = None,
    columns: options.Columns = None,
    skip_bad: options.SkipBad = None,
    resume: Annotated[bool, Option("--resume/--restart", help="Resume interrupted cohorts, or start over.")] = True,
    cluster: options.ClusterAt = None,
    workers: options.Workers = None,
    together: options.Together = None,
    run: Annotated[
        Path | None, Option("--run", help="Folder for this run's settings and metrics, for mta-lab report.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Compute a merge and train a stack for each person in a file, in cohorts.

    People whose states are up to date are skipped, so the command can be repeated. --update reads only the new items.
    With laplace, the default policy, the new coefficients are those of all items. With other policies, they change
    only if the new items show a need. A stack is kept, or trained further. --update without --latest keeps a state
    that was made from more items than the file has. Without --update, the file alone counts.

    Example:  mta personalize newcomers.jsonl --bank bank/ --store people/
    Example:  mta personalize everybody.jsonl --bank bank/ --store s3://bucket/people --cluster ray://head:10001
    """
    from mta.personalize.outcomes import as_json, counts
    from mta.store import Store

    if update and not resume:
        raise InputError("--restart was given with --update, which always goes on", hint="Leave one of them out.")
    options.check_out(run)
    session = Store(store).session()  # before the source is read
    read = options.people_in(source, options.task_of(bank), columns, skip_bad)
    people = [person.latest(latest) if latest else person for person in read if person.items] or read
    if empty := len(read) - len(people):
        typer.echo(f"{empty} of {len(read)} people have no item besides their own questions: left out", err=True)
    base, opened, settings = options.open_bank(
        bank, words, seed=seed, device=device, config=config, open_to=options.MERGE_AND_STACK
    )
    _warn_of_members(opened, people)
    with options.executor_at(cluster, workers, settings.device, together) as executor, Screen() as screen:
        personal = mta.Personalizer(base, opened, session.store, run=settings, executor=executor)
        used = base.as_loaded(settings).model_dump(mode="json")
        work = json_sha256([used, opened.hash, sorted(p.digest() for p in people)])  # so that `run` can be continued
        with options.run_folder("personalize", run, base, opened, used, screen.step, work) as folder:
            again = partial(personal.update, fewer=latest is not None)
            compute = again if update else partial(personal.personalize, resume=resume)
            done = compute(people, histories=read if keep_histories else (), session=session, on_step=folder.step)
            folder.outcome, folder.about["plan"] = counts(done), done.plan
    show_json(as_json(done)) if json else typer.echo(str(done))
    _warn_of_failures(done)


def _warn_of_members(bank: mta.Bank, people: Sequence[mta.Person]) -> None:
    if bank.info.members.hashed is None:
        typer.echo("This bank came without its members: these people may have helped to train it.", err=True)
    if seen := sum(bool(bank.info.members.parts_of(person.id)) for person in people):
        typer.echo(f"{seen} of {len(people)} people helped to train this bank, so it has seen their items.", err=True)


def _warn_of_failures(done: Personalized | Updated) -> None:
    if ahead := getattr(done, "ahead", ()):
        typer.echo(f"kept, because their models know more items than the file: {len(ahead)} people", err=True)
    if done.forgotten:
        typer.echo(f"forgotten meanwhile, so nothing was saved for them: {len(done.forgotten)} people", err=True)
    for person, error in done.failed.items():
        typer.echo(f"not personalized: {person!r}: {error}", err=True)
    if done.failed:
        raise typer.Exit(1)
