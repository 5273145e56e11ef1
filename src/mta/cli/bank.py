"""``mta bank``: build, calibrate, show, and publish a bank of anchors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mta.cli.data import Source, people_in
from mta.cli.options import (
    ClusterAt,
    Config,
    Device,
    Json,
    Private,
    Seed,
    SkipBad,
    Task,
    Together,
    Track,
    Words,
    Workers,
    Yes,
    agreed,
    bank_at,
    executor_at,
    settings,
    show_json,
    show_parcel,
    tracked,
    typed,
)

if TYPE_CHECKING:
    from mta.bank.bank import Bank
    from mta.config import Run

Resume = Annotated[bool, typer.Option("--resume/--restart", help="Resume an interrupted build, or start over.")]
app = typer.Typer(help="Build, calibrate, show, and publish a bank of anchors.", no_args_is_help=True)


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
    resume: Resume = True,
    cluster: ClusterAt = None,
    workers: Workers = None,
    together: Together = None,
    track: Track = None,
    json: Json = False,
) -> None:
    """Train the task LoRA and one meta-LoRA per anchor (stages 0 and 1).

    An interrupted build resumes where it stopped. A finished build is not changed.

    Example:  mta bank build history.jsonl --task lamp3 --out bank/ bank.anchors=20
    """
    from mta.bank.bank import Bank
    from mta.cli.screen import Screen
    from mta.model.base import BaseModel

    opened = tracked(track, out)
    run = settings(config, words, task=task, base=base, seed=seed, device=device)
    people = people_in(source, run.task, skip_bad)
    with executor_at(cluster, workers, together) as executor, Screen() as screen:
        bank = Bank.build(
            BaseModel.of(run),
            people,
            out,
            task=run.task,
            run=run,
            executor=executor,
            on_step=screen.step,
            resume=resume,
            command=typed(),
            track=opened,
        )
    show_json(_summary(bank)) if json else _tell(bank, out, run)


def _tell(bank: Bank, out: Path, run: Run) -> None:
    from mta.bank.card import in_words

    typer.echo(f"{out}: {len(bank)} anchors, task LoRA {'yes' if bank.task_lora else 'no'}, hash {bank.hash[:12]}")
    if bank.calibration:
        typer.echo(in_words(bank.calibration.info))
    if len(bank) < run.bank.anchors:
        candidates = f"{bank.info.members.candidates} candidates have at least {run.bank.min_items} items"
        built = f"Built {len(bank)} of {run.bank.anchors} anchors"
        typer.echo(f"{built}: {candidates}, and at most a quarter of the candidates become anchors.", err=True)


@app.command("calibrate")
def calibrate(
    folder: Annotated[Path, typer.Argument(help="Folder of a bank.", callback=bank_at)],
    source: Source,
    words: Words = None,
    config: Config = None,
    device: Device = None,
    skip_bad: SkipBad = None,
    cluster: ClusterAt = None,
    workers: Workers = None,
    together: Together = None,
    json: Json = False,
) -> None:
    """Calibrate a finished bank on people who are not in it; new banks are calibrated when they are built.

    People in the bank are left out. The bank gets a new hash, so personalize everybody again. An interrupted
    calibration resumes.

    Example:  mta bank calibrate bank/ others.jsonl calibration.people=32
    """
    from mta.bank.bank import Bank
    from mta.bank.format import read_info
    from mta.cli.screen import Screen
    from mta.config import override
    from mta.data.tasks.task import Task as TaskType
    from mta.model.base import BaseModel

    info = read_info(folder)
    run = override(info.run, words or (), config).model_copy(update={"device": device or "auto"})
    people, base = people_in(source, TaskType.model_validate(info.task), skip_bad), BaseModel.of(run)
    with executor_at(cluster, workers, together) as executor, Screen() as screen:
        bank = Bank.open(folder, base).calibrate(base, people, run=run, executor=executor, on_step=screen.step)
    show_json(_summary(bank)) if json else _tell(bank, folder, run)


@app.command("show")
def show(
    folder: Annotated[Path, typer.Argument(help="Folder or hub id of a bank.", callback=bank_at)], json: Json = False
) -> None:
    """Verify all hashes of a bank, and print its card.

    Example:  mta bank show bank/
    """
    from mta.bank.card import body
    from mta.bank.format import read_info, stale, verify

    info = read_info(folder)
    verify(folder, info, full=True)
    if json:
        return show_json(info.model_dump(mode="json", exclude={"members"}) | {"needs_rebuild": stale(folder)})
    if parts := stale(folder):
        typer.echo(f"Needs a rebuild: a forgotten person is in the {' and the '.join(parts)}.\n")
    typer.echo(body(info))


@app.command("publish")
def publish(
    folder: Annotated[Path, typer.Argument(help="Folder of a bank.")],
    to: Annotated[str, typer.Option(help="Repository on the hub: owner/name.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files to send, and send nothing.")] = False,
    private: Private = True,
    results: Annotated[
        Path | None, typer.Option(help="results.json of mta evaluate, to show on the card.", dir_okay=False)
    ] = None,
    license: Annotated[str, typer.Option(help="License id of the bank on the hub, for example apache-2.0.")] = "",
    with_members: Annotated[
        bool,
        typer.Option(
            "--with-members", help="Send members.json too: readers can then test if a guessed id is in the bank."
        ),
    ] = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """List all files to send, then publish the bank and its card on the hub.

    The member list and local paths are not sent. The bank keeps its hash, so people's states stay valid.

    Example:  mta bank publish bank/ --to owner/name --dry-run
    """
    from mta.bank.publish import bank_parcel, publish_bank

    parcel = bank_parcel(folder, to, results=results, license=license, with_members=with_members)
    if json and dry_run:
        return show_json({"to": to, "private": private, "files": parcel.sizes(), "facts": parcel.facts})
    show_parcel(parcel, to, private, err=not dry_run)
    if dry_run:
        return
    agreed(yes)
    url = publish_bank(folder, to, parcel, private=private)
    show_json({"url": url, "files": parcel.sizes()}) if json else typer.echo(url)


def _summary(bank: Bank) -> dict[str, object]:
    return {
        "folder": str(bank.folder),
        "anchors": len(bank),
        "hash": bank.hash,
        "seconds": bank.info.seconds,
        "cut": bank.info.cut,
        "calibration": bank.calibration and bank.calibration.info.model_dump(mode="json"),
    }
