"""``mta bank``: build a bank of anchors, and look at one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mta.cli.data import Source, people_in
from mta.cli.options import (
    ClusterAt,
    Config,
    Device,
    Json,
    Seed,
    SkipBad,
    Task,
    Together,
    Track,
    Words,
    Workers,
    executor_at,
    settings,
    show_json,
    tracked,
    typed,
)

if TYPE_CHECKING:
    from mta.bank.bank import Bank

app = typer.Typer(help="Build a bank of anchors, and look at one.", no_args_is_help=True)


@app.command("build")
def build(
    source: Source,
    words: Words = None,
    out: Annotated[Path, typer.Option(help="Folder of the new bank.")] = Path("bank"),
    task: Task = None,
    base: Annotated[str | None, typer.Option(help="Asset name, folder or hub id of the base model.")] = None,
    config: Config = None,
    seed: Seed = None,
    device: Device = None,
    skip_bad: SkipBad = None,
    resume: Annotated[bool, typer.Option("--resume/--restart", help="Go on with a build that was stopped.")] = True,
    cluster: ClusterAt = None,
    workers: Workers = None,
    together: Together = None,
    track: Track = None,
    json: Json = False,
) -> None:
    """Train the task LoRA and one meta-LoRA per anchor (stages 0 and 1).

    A build that was stopped goes on where it was; a finished one is left as it is.

    Example:  mta bank build history.jsonl --task lamp3 --out bank/ bank.anchors=20
    """
    from mta.bank.bank import Bank
    from mta.base import BaseModel
    from mta.cli.screen import Screen

    opened = tracked(track, out)
    run = settings(config, words, task=task, base=base, seed=seed, device=device)
    people = people_in(source, run.task, skip_bad)
    with executor_at(cluster, workers, together) as executor, Screen() as screen:
        how: dict[str, Any] = {"executor": executor, "on_step": screen.step, "resume": resume}
        how |= {"command": typed(), "track": opened}
        bank = Bank.build(BaseModel.of(run), people, out, task=run.task, run=run, **how)
    if json:
        return show_json(_summary(bank))
    typer.echo(f"{out}: {len(bank)} anchors, task LoRA {'yes' if bank.task_lora else 'no'}, hash {bank.hash[:12]}")
    if len(bank) < run.bank.anchors:
        few = f"{run.bank.anchors} anchors were asked for; at most a quarter of the candidates become one, and"
        typer.echo(
            f"{few} {len(bank.info.members.candidates)} people have {run.bank.min_items} items or more.", err=True
        )


@app.command("show")
def show(folder: Annotated[Path, typer.Argument(help="Folder of a bank.")], json: Json = False) -> None:
    """Check every hash of a bank and print its card.

    Example:  mta bank show bank/
    """
    from mta.bank.card import card
    from mta.bank.files import read_info, stale, verify

    info = read_info(folder)
    verify(folder, info, full=True)
    if json:
        return show_json(info.model_dump(mode="json", exclude={"members"}) | {"needs_rebuild": stale(folder)})
    typer.echo(card(info))
    if parts := stale(folder):
        typer.echo(f"Needs a rebuild: somebody who asked to be forgotten is in the {' and the '.join(parts)}.")


def _summary(bank: Bank) -> dict[str, object]:
    return {
        "folder": str(bank.folder),
        "anchors": len(bank),
        "hash": bank.hash,
        "seconds": bank.info.seconds,
        "cut": bank.info.cut,
    }
