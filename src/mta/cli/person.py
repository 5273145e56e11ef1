"""``mta person``: explain what is stored for one person, list versions, and restore one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mta.cli.options import BankDir, Json, StoreUrl, show_json
from mta.system.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from mta.tools.inspect import Rebuild, Summary

app = typer.Typer(help="Show what is stored for one person, and restore earlier versions.", no_args_is_help=True)
Who = Annotated[str, typer.Argument(help="Person id.")]
SHOWN = 12  # anchors in a chart; --json has all
WIDTH = 30  # characters of the longest bar


@app.command("show")
def show(person: Who, bank: BankDir = Path("bank"), store: StoreUrl = "people", json: Json = False) -> None:
    """Explain a person's state: coefficients of the anchors, losses on the shots, and what is stored where.

    Loads no model, and prints none of the person's texts.

    Example:  mta person show ann --bank bank/ --store people/
    """
    from mta.store import Store
    from mta.tools.inspect import summarize

    found = summarize(person, Store(store), bank)
    if json:
        return show_json(asdict(found))
    say = Console(highlight=False, soft_wrap=True, markup=False).print
    say(f"version {found.version}, of {found.versions} kept; saved {found.time or 'at an unknown time'}")
    other = f"not the one at {bank} ({found.bank_here[:12]}): personalize again before asking"
    say(f"bank {found.bank[:12]}, " + (f"the one at {bank}" if found.bank == found.bank_here else other))
    say(f"merge: {found.policy}, {len(found.weights)} anchors, {found.mode}")
    say(_chart(found))
    for line in _facts(found):
        say(line)


def _chart(found: Summary) -> Table:
    """Return a bar chart of the anchors, largest coefficient first."""
    from rich.bar import Bar
    from rich.table import Table

    rows = [(f"anchor {one.anchor}", one.w) for one in found.weights[:SHOWN]]
    if rest := found.weights[SHOWN:]:
        rows.append((f"{len(rest)} others", sum(one.w for one in rest)))
    if found.null is not None:
        rows.append(("the pooled model", found.null))
    table = Table(box=None, show_header=False)
    most = max(abs(w) for _, w in rows)
    for name, w in rows:
        table.add_row(name, f"{w:.3f}", Bar(size=most, begin=0, end=abs(w), width=WIDTH))
    return table


def _facts(found: Summary) -> list[str]:
    from mta.tools.inspect import gains

    stack, losses = found.stack, found.losses
    lines = [f"stack: rank {stack.rank}, {human_bytes(stack.bytes)}" if stack else "stack: none, the merge alone"]
    if losses:
        by_model = {
            "pooled model": losses.pooled,
            "with the merge": losses.merged,
            "with merge and stack": losses.stacked,
        }
        each = ", ".join(f"{name} {loss:.3f}" for name, loss in by_model.items() if loss is not None)
        lines += [
            f"nats per token on their shots ({losses.tokens} target tokens): {each}",
            *map("  {}".format, gains(losses)),
        ]
    else:
        lines.append("losses on their shots: not recorded (personalize again to record them)")
    lines.append("history: not kept" if found.history is None else f"history: {found.history} items kept")
    broken = " (interrupted)"
    lines += [f"exported to {one.folder} on {one.host}{'' if one.sha256 else broken}" for one in found.exports]
    parts = "not known, it came without its members" if found.trained is None else ", ".join(found.trained) or "none"
    lines.append(f"parts of the bank that were trained on them: {parts}")
    lines.append(f"stored in total: {human_bytes(found.bytes)}")
    return [*lines, _price(found.rebuild)] if found.rebuild else lines


def _price(rebuild: Rebuild) -> str:

    over = f"about {rebuild.tokens:.0f} tokens" if rebuild.tokens else f"shots of {rebuild.targets} target tokens"
    said = f"cost of making it again: {rebuild.forward:.0f} forward and {rebuild.trained:.0f} forward-backward passes"
    said += f" over {over}"
    if rebuild.operations is None or rebuild.seconds is None:
        return said
    return f"{said}: {rebuild.operations:.1e} operations, about {human_seconds(rebuild.seconds)} on {rebuild.machine}"


@app.command("versions")
def versions(person: Who, store: StoreUrl = "people", json: Json = False) -> None:
    """List a person's versions, oldest first: bytes, work id (equal ids mean equal content), policy.

    Example:  mta person versions ann --store people/
    """
    from mta.store import Store
    from mta.tools.inspect import versions_of

    found = versions_of(person, Store(store))
    if json:
        return show_json([asdict(one) for one in found])
    for one in found:
        what = f"work {one.work[:8]}  {one.policy}" if one.work else "damaged"
        typer.echo(f"{one.version}  {human_bytes(one.bytes)}  {what}{'  (latest)' if one.latest else ''}")


@app.command("rollback")
def rollback(
    person: Who,
    version: Annotated[int, typer.Argument(help="The version to go back to.")],
    store: StoreUrl = "people",
    json: Json = False,
) -> None:
    """Restore an earlier version: save its content as a new version, and keep all versions.

    Personalizing again with other shots or settings makes a newer version.

    Example:  mta person rollback ann 2 --store people/
    """
    from mta.store import Store

    newest = Store(store).rollback(person, version)
    if json:
        return show_json({"content_of": version, "version": newest})
    typer.echo(f"the newest version is {newest}, with the content of version {version}")
