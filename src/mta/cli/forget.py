"""``mta forget``: remove what is kept of a person."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mta.cli.options import BankDir, Json, StoreUrl, show_json


def forget(
    person: Annotated[str, typer.Argument(help="Who.")],
    bank: BankDir = Path("bank"),
    no_bank: Annotated[
        bool, typer.Option("--no-bank", help="The bank is not there: forget, and list nothing learnt from them.")
    ] = False,
    store: StoreUrl = "people",
    json: Json = False,
) -> None:
    """Remove a person's states, history and exports, and name the trained parts that still hold something of them.

    An exported adapter goes where mta export wrote it, if it is on this machine and unchanged; the others are named.

    Example:  mta forget ann --bank bank/ --store people/
    """
    from mta.personalize import forget_person
    from mta.store import Store

    people = Store(store)
    done = forget_person(person, people, *([] if no_bank else [bank]))
    if not (done.states_removed or done.needs_rebuild):
        people.check()
    if json:
        return show_json(asdict(done))
    typer.echo("removed" if done.states_removed else "nothing was kept of that person")
    typer.echo("Take them out of your own files too: mta personalize makes whoever is in its source.", err=True)
    for export in done.exports_left:
        typer.echo(f"exported and not removed: {export}")
    if done.needs_rebuild:
        typer.echo(f"still learnt from them, until the bank is rebuilt without them: {', '.join(done.needs_rebuild)}")
    for place in done.published:
        typer.echo(f"published with it, and to be deleted there by hand: {place}")
    for folder in done.unknown:
        typer.echo(f"not known: {folder} came without its members; who published it knows whether it learnt from them")
