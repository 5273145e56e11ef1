"""``mta forget``: remove all stored data of a person."""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mta.cli.options import Json, StoreUrl, bank_at, show_json
from mta.errors import MtaError

if TYPE_CHECKING:
    from mta.personalize.forgetting import Forgotten

INCOMPLETE = 3  # exit code; 1 is an error, 2 is wrong usage of the command line


def forget(
    person: Annotated[str, typer.Argument(help="Person id.")],
    bank: Annotated[Path, typer.Option("--bank", help="Folder or hub id of a bank.")] = Path("bank"),
    no_bank: Annotated[
        bool, typer.Option("--no-bank", help="Forget without a bank, and list no parts trained on the person.")
    ] = False,
    store: StoreUrl = "people",
    json: Json = False,
) -> None:
    """Remove a person's states, history and exports, and name the parts of the bank that were trained on the person.

    Removes adapters that mta export wrote on this machine if they are unchanged, and names the others. Exits with 1
    if some data of the person could not be removed. Exits with 3 if the person is forgotten, but a bank could not be
    marked as needing a rebuild or an export was out of reach: repeat the command. A running mta serve drops the
    person's data within seconds.

    Example:  mta forget ann --bank bank/ --store people/
    """
    from mta.personalize.forgetting import forget_person
    from mta.store import Store

    people, folder = Store(store), bank
    with suppress(MtaError):  # an unreachable bank does not stop forgetting: it is reported as not marked
        folder = bank_at(bank)
    done = forget_person(person, people, *([] if no_bank else [folder]))
    if not (done.states_removed or done.needs_rebuild):
        people.check()
    if json:
        show_json(asdict(done))
    else:
        _tell(done)
    if done.complete:
        return
    words = ["mta", "forget", person, "--store", store, *(["--no-bank"] if no_bank else ["--bank", str(bank)])]
    typer.echo(
        f"The person is forgotten, but some steps failed. Correct them, and repeat:  {shlex.join(words)}", err=True
    )
    raise typer.Exit(INCOMPLETE)


def _tell(done: Forgotten) -> None:
    typer.echo("removed" if done.states_removed else "nothing is stored for this person")
    typer.echo("Remove the person from your own files too: mta personalize recreates everyone in its source.", err=True)
    for export in done.exports_left:
        typer.echo(f"exported and not removed: {export}")
    if done.needs_rebuild:
        typer.echo(f"trained on the person, until you rebuild the bank without them: {', '.join(done.needs_rebuild)}")
    for folder, reason in done.unmarked.items():
        typer.echo(f"not marked as needing a rebuild: {folder} ({reason})")
    for place in done.published:
        typer.echo(f"the bank was published; delete it there by hand: {place}")
    for folder in done.unknown:
        typer.echo(f"not known: {folder} came without its members; only its publisher can tell if the person is in it")
