"""``mta store``: check, measure, and clean up a store."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from mta.cli.options import Json, show_json
from mta.system.units import human_bytes

app = typer.Typer(help="Check, measure, and clean up a store of people's states.", no_args_is_help=True)
Url = Annotated[str, typer.Argument(help="The store: a folder or an fsspec URL.")]


@app.command("check")
def check(store: Url = "people", json: Json = False) -> None:
    """Read every state, history and list of exports; exits with 1 if one is damaged.

    Example:  mta store check people/
    """
    from mta.cli.screen import counted
    from mta.store import Store, maintenance

    with counted("files") as on_file:
        found = maintenance.check(Store(store), on_file)
    if json:
        show_json(asdict(found))
    else:
        exports = f", {found.exports} lists of exports" if found.exports else ""
        typer.echo(f"{found.people} people, {found.states} states and {found.histories} histories{exports} read")
        for name, wrong in found.damaged.items():
            typer.echo(f"damaged: {name}: {wrong}")
        for name in found.strangers:
            typer.echo(f"not a file of a store: {name}")
        if found.leftovers:
            typer.echo(f"left by killed writers: {len(found.leftovers)} files (mta store gc {store})")
        if found.exposed:
            typer.echo(f"others can read this store: {found.exposed}")
    if found.damaged:
        raise typer.Exit(1)


@app.command("stats")
def stats(store: Url = "people", json: Json = False) -> None:
    """Count people, versions, histories and bytes, without reading any file.

    Example:  mta store stats s3://bucket/people --json
    """
    from mta.store import Store, maintenance

    found = maintenance.stats(Store(store))
    if json:
        return show_json(asdict(found))
    typer.echo(f"{found.people} people, {found.versions} versions, {found.histories} histories kept by opt-in")
    each = f"{human_bytes(found.bytes_per_person)} a person (median {human_bytes(found.median_bytes)}"
    typer.echo(f"{human_bytes(found.bytes)}: {each}, most {human_bytes(found.most_bytes)})")


@app.command("gc")
def gc(
    store: Url = "people",
    keep: Annotated[int | None, typer.Option(min=1, help="Keep only this many newest versions of each person.")] = None,
    older: Annotated[float, typer.Option(min=0, help="Remove half-written files only after this many hours.")] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files to remove, and remove nothing.")] = False,
    json: Json = False,
) -> None:
    """Remove half-written files of killed writers; with --keep also old versions, which cannot be restored.

    Example:  mta store gc people/ --keep 2 --dry-run
    """
    from mta.cli.screen import counted
    from mta.store import Store, maintenance

    with counted("people") as on_person:
        gone = maintenance.collect(Store(store), keep, older * 3600, dry_run, on_person)
    if json:
        return show_json({"removed": not dry_run, "files": gone})
    for name in gone if dry_run else ():
        typer.echo(name)
    typer.echo(f"{len(gone)} files, {human_bytes(sum(gone.values()))}{' would be removed' if dry_run else ' removed'}")
