"""``mta store``: check and clean up a store."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from shlex import quote
from typing import Annotated

import typer
from typer import Argument, Option

from mta.cli import options
from mta.cli.screen import Screen, show_json
from mta.system.units import human_bytes

app = typer.Typer(help="Check and clean up a store of people's states.", no_args_is_help=True)
Url = Annotated[str, Argument(help="The store: a folder or an fsspec URL.")]


@app.command()
def check(store: Url = "people", json: options.Json = False) -> None:
    """Read and count all states, histories and lists of exports. Exits with 1 if a file is damaged.

    Example:  mta store check people/
    """
    from mta.store import Store, maintenance

    with Screen("files") as screen:
        report = maintenance.check(Store(store), partial(screen.count, "check"))
    if json:
        show_json(asdict(report))
    else:
        exports = f", {report.exports} lists of exports" if report.exports else ""
        read = f"{report.people} people, {report.states} states and {report.histories} histories{exports} read"
        lines = [f"{read}: {human_bytes(report.bytes)}"]
        if len(report.banks) > 1:
            lines += [f"newest state of bank {bank[:8]}…: {count} people" for bank, count in report.banks.items()]
        lines += [f"damaged: {name}: {wrong}" for name, wrong in report.damaged.items()]
        lines += [f"not a file of a store: {name}" for name in report.strangers]
        if report.leftovers:
            remove = f"mta store gc {quote(options.without_passwords(store))}"
            lines.append(f"left by killed writers: {len(report.leftovers)} files ({remove})")
        if report.exposed:
            lines.append(f"others can read this store: {report.exposed}")
        typer.echo("\n".join(lines))
    if report.damaged:
        raise typer.Exit(1)


@app.command()
def gc(
    store: Url = "people",
    keep: Annotated[int | None, Option(min=1, help="Remove old versions for good; keep this many per person.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="List the files to remove, and remove nothing.")] = False,
    json: options.Json = False,
) -> None:
    """Remove killed writers' files after an hour, stopped runs and tombstones after a week; with --keep, old versions.

    Example:  mta store gc people/ --keep 2 --dry-run
    """
    from mta.store import Store, maintenance

    with Screen("people") as screen:
        gone = maintenance.collect(Store(store), keep, dry=dry_run, on_person=partial(screen.count, "gc"))
    if json:
        return show_json({"removed": not dry_run, "files": gone})
    for name in gone if dry_run else ():
        typer.echo(name)
    typer.echo(f"{len(gone)} files, {human_bytes(sum(gone.values()))}{' would be removed' if dry_run else ' removed'}")
