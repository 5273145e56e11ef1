"""``mta bank``: build, calibrate, rebuild, show, and publish a bank of anchors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

import mta
from mta.cli import options
from mta.cli.screen import Screen, show_json
from mta.config.constants import ROUNDING_ONLY

app = typer.Typer(help="Build, calibrate, rebuild, show, and publish a bank of anchors.", no_args_is_help=True)


@app.command()
def build(
    source: options.Source,
    words: options.Words = None,
    out: Annotated[Path, Option(help="Folder of the new bank.")] = Path("bank"),
    task: options.Task = None,
    base: Annotated[str | None, Option(help="Asset name, folder, GGUF file or hub id of the base model.")] = None,
    config: options.Config = None,
    seed: options.Seed = None,
    device: options.Device = None,
    columns: options.Columns = None,
    skip_bad: options.SkipBad = None,
    hold_out: Annotated[int, Option(min=0, help="Number of people outside the bank, for mta compare on SOURCE.")] = 0,
    cluster: options.ClusterAt = None,
    workers: options.Workers = None,
    together: options.Together = None,
    json: options.Json = False,
) -> None:
    """Train the task LoRA and one meta-LoRA per anchor (stages 0 and 1).

    An interrupted build resumes where it stopped. A finished build is not changed.

    Example:  mta bank build history.jsonl --task lamp3 --out bank/ bank.anchors=20
    """
    options.check_out(out)
    run = options.settings(config, words, task=task, base=base, seed=seed, device=device)
    people = options.people_in(source, run.task, columns, skip_bad)
    with options.executor_at(cluster, workers, run.device, together) as executor, Screen() as screen:
        bank = mta.Bank.build(
            mta.BaseModel.of(run),
            people,
            out,
            task=run.task,
            run=run,
            hold_out=hold_out,
            executor=executor,
            on_step=screen.step,
            command=options.command_line(),
        )
    _show(bank, json)
    if len(bank) < run.bank.anchors and run.bank.choose != "groups" and not json:
        candidates = f"{bank.info.members.candidates} candidates have at least {run.bank.min_items} items"
        built = f"Built {len(bank)} of {run.bank.anchors} anchors"
        typer.echo(f"{built}: {candidates}, and at most a quarter of the candidates become anchors.", err=True)


@app.command()
def calibrate(
    bank: Annotated[Path, Argument(help="Folder of a bank with its member list.")],
    source: options.Source,
    out: Annotated[Path, Option(help="New folder for the calibrated copy; the bank stays as it is.")],
    words: options.Words = None,
    config: options.Config = None,
    device: options.Device = None,
    columns: options.Columns = None,
    skip_bad: options.SkipBad = None,
    cluster: options.ClusterAt = None,
    workers: options.Workers = None,
    together: options.Together = None,
    json: options.Json = False,
) -> None:
    """Calibrate a finished bank on items outside its training: policy, stack, and expected gains.

    Members of the bank are left out, except for items that candidates kept back. When the calibrated copy is complete,
    it appears in --out. The copy has a new hash: personalize all people again with it.

    Example:  mta bank calibrate bank/ others.jsonl --out bank-2/ calibration.people=32
    """
    options.check_out(out)
    people = options.people_in(source, options.task_of(bank), columns, skip_bad)
    base, opened, run = options.open_bank(
        bank, words, device=device, config=config, open_to=frozenset({"calibration"}), machine=ROUNDING_ONLY | {"base"}
    )
    with options.executor_at(cluster, workers, run.device, together) as executor, Screen() as screen:
        calibrated = opened.calibrate(base, people, out, run=run, executor=executor, on_step=screen.step)
    _show(calibrated, json)


@app.command()
def rebuild(
    bank: Annotated[Path, Argument(help="Folder of a bank with its member list.")],
    source: options.Source,
    out: Annotated[Path, Option(help="New folder for the copy; the bank stays as it is.")],
    words: options.Words = None,
    device: options.Device = None,
    columns: options.Columns = None,
    skip_bad: options.SkipBad = None,
    cluster: options.ClusterAt = None,
    workers: options.Workers = None,
    together: options.Together = None,
    json: options.Json = False,
) -> None:
    """Retrain the groups of a bank that include forgotten people. Other groups stay unchanged.

    SOURCE holds the people of these groups. The task LoRA and the first choice of anchors stay. The copy still says
    that a forgotten person helped to train them: only a new build is without the person.

    Example:  mta bank rebuild bank/ history.jsonl --out bank-2/
    """
    options.check_out(out)
    people = options.people_in(source, options.task_of(bank), columns, skip_bad)
    base, opened, run = options.open_bank(bank, words, device=device, machine=ROUNDING_ONLY | {"base"})
    with options.executor_at(cluster, workers, run.device, together) as executor, Screen() as screen:
        rebuilt = opened.rebuild_groups(base, people, out, run=run, executor=executor, on_step=screen.step)
    _show(rebuilt, json)


def _show(bank: mta.Bank, json: bool) -> None:
    from mta.bank.card import what_to_expect

    info = bank.info
    if json:
        facts = {"anchors": len(bank), "task_lora": bank.task_lora is not None, "hash": bank.hash}
        facts |= {"seconds": info.seconds, "cut": info.cut}
        facts |= {"calibration": info.calibration and info.calibration.model_dump(mode="json")}
        return show_json({"folder": str(bank.folder), **facts})
    task_lora = "yes" if bank.task_lora else "no"
    typer.echo(f"{bank.folder}: {len(bank)} anchors, task LoRA {task_lora}, hash {bank.hash[:12]}")
    if info.calibration:
        typer.echo(what_to_expect(info))
    return None


@app.command()
def show(
    folder: Annotated[Path, Argument(help="Folder or hub id of a bank.", callback=options.bank_at)],
    json: options.Json = False,
) -> None:
    """Verify all hashes of a bank, and print its card.

    Example:  mta bank show bank/
    """
    from mta.bank.card import body
    from mta.bank.format import read_info, verify
    from mta.bank.notes import parts_to_rebuild, stale_report

    info = read_info(folder)
    verify(folder, info, full=True)
    if json:
        return show_json(info.model_dump(mode="json") | {"needs_rebuild": parts_to_rebuild(folder)})
    if report := stale_report(folder):
        typer.echo(f"{report.message[0].upper()}{report.message[1:]}. {report.hint}\n")
    typer.echo(body(info))


@app.command()
def publish(
    folder: Annotated[Path, Argument(help="Folder of a bank.")],
    to: Annotated[str, Option(help="Repository on the hub: owner/name.")],
    private: options.Private = True,
    license: Annotated[str, Option(help="License id of the bank on the hub, for example apache-2.0.")] = "",
    yes: Annotated[bool, Option("--yes", help="Send the files instead of only listing them.")] = False,
    json: options.Json = False,
) -> None:
    """List the files for the hub: the bank and its card. With --yes, send them.

    The member list and local paths are not sent. The bank keeps its hash, so people's states stay valid.

    Example:  mta bank publish bank/ --to owner/name
    """
    from mta.bank.publish import bank_upload, publish_bank

    upload = bank_upload(folder, to, license=license)
    sizes, url = upload.sizes(), publish_bank(folder, to, upload, private=private) if yes else None
    if json:
        return show_json({"to": to, "private": private, "files": sizes, "facts": upload.facts, "url": url})
    lines = [f"To {to}, {'private' if private else 'PUBLIC'}: {len(sizes)} files, {sum(sizes.values()):,} bytes"]
    lines += [f"  {size:>14,}  {name}" for name, size in sizes.items()]
    lines += [f"{name}: {fact}" for name, fact in upload.facts.items()]
    typer.echo("\n".join([*lines, url or "Nothing was sent. To send this, add  --yes"]))
