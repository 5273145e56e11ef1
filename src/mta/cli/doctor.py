"""``mta doctor``: check whether mta can run on this machine, and print the commands that fix problems."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mta.cli.options import Json, show_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from mta.tools.doctor import Finding

MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[bold red]problem[/]"}


def doctor(
    bank: Annotated[Path | None, typer.Option("--bank", help="Check this bank too.")] = None,
    store: Annotated[str | None, typer.Option("--store", help="Check this store too.")] = None,
    json: Json = False,
) -> None:
    """Check versions, processor, memory, kernels, cache and extras. Exits with 1 if mta demo cannot run here.

    Downloads nothing and loads no model. Compiles kernels that are not compiled yet, which takes seconds.

    Example:  mta doctor --bank bank/ --store people/
    """
    from mta.tools.doctor import examine

    found = examine(bank, store)
    problems, warnings = (sum(one.verdict == verdict for one in found) for verdict in ("problem", "warning"))
    if json:
        show_json({"problems": problems, "warnings": warnings, "findings": [asdict(one) for one in found]})
    else:
        say = Console(highlight=False).print
        say(_table(found))
        start = "Ready." if bank or store else "Ready. Start with:  mta demo"
        counted = f"{problems} problem{'s' * (problems != 1)}, {warnings} warning{'s' * (warnings != 1)}"
        say(f"{counted}. " + ("Fix the problems first." if problems else start))
    if problems:
        raise typer.Exit(1)


def _table(found: Sequence[Finding]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=False, show_edge=False, pad_edge=False)
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    about = ""
    for one in found:
        if one.about != about:
            table.add_section()
        shown, about = one.about if one.about != about else "", one.about
        hint = f"\n[dim]{escape(one.hint)}[/]" if one.hint else ""
        table.add_row(f"[bold]{shown}[/]", escape(one.name), MARKS[one.verdict], escape(one.found) + hint)
    return table
