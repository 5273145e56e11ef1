"""``mta person``, ``mta export``, and ``mta forget``: show, restore, export, and remove what is stored for a person."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, replace
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from typer import Argument, Option

import mta
from mta.cli import options
from mta.cli.screen import show_json
from mta.errors import InputError, MtaError, StoreError
from mta.system.units import human_bytes

if TYPE_CHECKING:
    from mta.personalize.forgetting import Forgotten
    from mta.tools.inspect import Summary

app = typer.Typer(help="Show what is stored for one person, and restore earlier versions.", no_args_is_help=True)
SHOWN = 12  # anchors with the largest coefficients; --json has all
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM accepts for its slots
INCOMPLETE = 3  # exit code of mta forget; 1 is an error, 2 is wrong usage of the command line


@app.command()
def show(
    person: options.PersonId,
    bank: options.BankDir = Path("bank"),
    store: options.StoreUrl = "people",
    json: options.Json = False,
) -> None:
    """Explain a person's state: coefficients of the anchors, losses on the shots, and stored data.

    Loads no model, and prints none of the person's texts.

    Example:  mta person show ann --bank bank/ --store people/
    """
    from mta.store import Store
    from mta.tools.inspect import summarize

    summary = summarize(person, Store(store), bank)
    if json:
        return show_json(asdict(summary))
    say = Console(highlight=False, soft_wrap=True, markup=False).print
    kept = ", ".join(map(str, summary.versions))
    say(f"version {summary.version}, saved {summary.time or 'at an unknown time'}; kept: {kept}")
    other = f"not the one at {bank} ({summary.bank_here[:12]}): personalize again before asking"
    say(f"bank {summary.bank[:12]}, " + (f"the one at {bank}" if summary.bank == summary.bank_here else other))
    say(f"merge: {summary.policy}, {len(summary.weights)} anchors")
    strongest = sorted(summary.weights, key=lambda anchor: -abs(summary.weights[anchor]))[:SHOWN]
    say("\n".join(f"anchor {anchor}  {w:+.3f}" for anchor, w in summary.weights.items() if anchor in strongest))
    if more := len(summary.weights) - len(strongest):
        say(f"and {more} others, see --json")
    say("\n".join(_facts(summary)))


def _facts(summary: Summary) -> list[str]:
    stack, losses = summary.stack, summary.losses
    lines = [f"stack: rank {stack['rank']}, {human_bytes(stack['bytes'])}" if stack else "stack: none, the merge alone"]
    if losses:
        names = "pooled model", "with the merge", "with merge and stack"
        models = dict(zip(names, (losses.pooled, losses.merged, losses.stacked)))
        each = ", ".join(f"{name} {loss:.3f}" for name, loss in models.items() if loss is not None)
        lines.append(f"nats per token on their shots ({losses.tokens} target tokens): {each}")
    else:
        lines.append("losses on their shots: not recorded (personalize again to record them)")
    lines.append("history: not kept" if summary.history is None else f"history: {summary.history} items kept")
    for one in summary.exports:
        lines.append(f"exported to {one.folder} on {one.host}{'' if one.sha256 else ' (interrupted)'}")
    parts = (
        "not known, it came without its members" if summary.trained is None else ", ".join(summary.trained) or "none"
    )
    lines.append(f"parts of the bank that were trained on them: {parts}")
    lines.append(f"stored in total: {human_bytes(summary.bytes)}")
    return lines


@app.command()
def rollback(
    person: options.PersonId,
    version: Annotated[int, Argument(help="Version to restore.")],
    store: options.StoreUrl = "people",
    json: options.Json = False,
) -> None:
    """Restore an earlier version: save its content as a new version, and keep all versions.

    The next mta personalize makes a newer version, unless its items and settings are those of the restored version.

    Example:  mta person rollback ann 2 --store people/
    """
    from mta.store import Store

    newest = Store(store).rollback(person, version)
    if json:
        return show_json({"content_of": version, "version": newest})
    typer.echo(f"the newest version is {newest}, with the content of version {version}")


def export(
    person: options.PersonId,
    out: Annotated[Path, Option(help="Folder to write.")],
    words: options.Words = None,
    rank: Annotated[int | None, Option(min=1, help="Compress to this rank with SVD, and print the error.")] = None,
    bank: options.BankDir = Path("bank"),
    store: options.StoreUrl = "people",
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Write the task LoRA, a person's merge and stack as one PEFT adapter for the unchanged base.

    The store records the folder in clear, so that mta forget removes the adapter too.

    Example:  mta export ann --out ann-adapter/ --rank 16
    """
    from mta.lora.peft import CONFIG

    options.check_out(out)
    base, opened, run = options.open_bank(bank, words, device=device, weights=False)
    personal = mta.Personalizer(base, opened, store, run=run)
    error = personal.export(person, out, rank=rank)
    needed = int(loads((out / CONFIG).read_text(encoding="utf-8"))["r"])
    slots = next((most for most in VLLM_RANKS if most >= needed), None)
    result: dict[str, object] = {"folder": str(out), "rank": needed, "max_lora_rank": slots, "relative_error": error}
    if json:
        return show_json(result)
    typer.echo(f"{out}: written" + (f"; rank {rank} causes a relative error of {error:.2%}" if rank else ""))
    needs = f"--max-lora-rank {slots}" if slots else "a smaller --rank here"
    typer.echo(f"rank {needed}: a vLLM server needs {needs}", err=True)


def forget(
    person: options.PersonId,
    bank: Annotated[
        list[Path] | None, Option("--bank", help="Folder or hub id of a bank; can be repeated. Default: bank.")
    ] = None,
    no_bank: Annotated[
        bool, Option("--no-bank", help="Forget without a bank, and list no parts trained on the person.")
    ] = False,
    store: options.StoreUrl = "people",
    json: options.Json = False,
) -> None:
    """Remove a person's states, history and exports, and name the parts of the bank that were trained on the person.

    Removes unchanged adapters that mta export wrote on this machine, and names the others. Exits with 1 if some data of
    the person could not be removed. Exits with 3 if the person is forgotten, but a bank could not be marked as needing
    a rebuild, or an export was out of reach. Also exits with 3 if a bank was marked, but no store exists. After exit
    code 3, repeat the command. A running mta serve drops the person's data within seconds.

    Example:  mta forget ann --bank bank/ --store people/
    """
    from mta.personalize.forgetting import forget_person
    from mta.store import Store

    if no_bank and bank:
        raise InputError("--bank and --no-bank exclude each other", hint="Leave one of them out.")
    people, banks = Store(store), [] if no_bank else bank or [Path("bank")]
    done = forget_person(person, people, *map(_reachable, banks))
    missing = ""
    try:
        if not done.states_removed:
            people.check()
    except StoreError as error:
        if not done.needs_rebuild:
            raise
        missing, done = error.message, replace(done, complete=False)
        typer.echo(f"{missing}, so no states were looked for.", err=True)
    show_json(asdict(done)) if json else _tell(done, missing)
    if done.complete:
        return
    said = "The bank is marked" if missing else "The person is forgotten, but some steps failed"
    typer.echo(f"{said}. Correct that, and repeat:  {options.command_line()}", err=True)
    raise typer.Exit(INCOMPLETE)


def _reachable(bank: Path) -> Path:
    """Return the folder of a bank; one that cannot be reached does not stop forgetting, but is reported as unmarked."""
    with suppress(MtaError):
        return options.bank_at(bank)
    return bank


def _tell(done: Forgotten, missing: str) -> None:
    typer.echo("removed" if done.states_removed else missing or "nothing is stored for this person")
    typer.echo("Remove the person from your own files too: mta personalize recreates everyone in its source.", err=True)
    lines = [f"exported and not removed: {export}" for export in done.exports_left]
    if parts := ", ".join(done.needs_rebuild):
        lines.append(f"trained on the person, until you rebuild the bank without them: {parts}")
    if {"task LoRA", "anchor"} & set(done.needs_rebuild):
        lines.append("adapters exported with such a bank hold these parts, too; so do its copies (mark each: --bank)")
    lines += [f"not marked as needing a rebuild: {folder} ({reason})" for folder, reason in done.unmarked.items()]
    lines += [f"the bank was published; delete it there by hand: {place}" for place in done.published]
    alone = "came without its members; only its publisher can tell if the person is in it"
    lines += [f"not known: {folder} {alone}" for folder in done.unknown]
    for line in lines:
        typer.echo(line)
