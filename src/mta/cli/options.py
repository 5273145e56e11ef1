"""Options and helpers that several verbs share."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mta.bank.bank import Bank
    from mta.config import Run
    from mta.data.tasks import Task as TaskType
    from mta.distributed.executor import Executor
    from mta.model.base import BaseModel
    from mta.system.hub import Parcel
    from mta.system.progress import OnStep
    from mta.tracking.run_folder import RunFolder
    from mta.tracking.trackers import Track as Opener

Words = Annotated[list[str] | None, typer.Argument(help="Settings as key=value, for example memory=8GiB.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file with settings.", dir_okay=False)]
Seed = Annotated[int | None, typer.Option(help="Seed of all random draws.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Task = Annotated[
    str | None,
    typer.Option(help="A built-in task (lamp1 … lamp7, movielens-rating, text) or a YAML file; default: text."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, or auto.")]
SkipBad = Annotated[Path | None, typer.Option(help="Write bad rows to this file, and continue.", dir_okay=False)]


def bank_at(name: Path) -> Path:
    """Return the folder of a bank; download the bank by its hub id if no such folder exists."""
    from mta.bank.publish import bank_folder

    return name if name.exists() else bank_folder(name)


BankDir = Annotated[Path, typer.Option("--bank", help="Folder or hub id of a bank.", callback=bank_at)]
StoreUrl = Annotated[str, typer.Option("--store", help="Store of people's states: a folder or an fsspec URL.")]
Yes = Annotated[bool, typer.Option("--yes", help="Send without asking for confirmation.")]
Private = Annotated[bool, typer.Option("--private/--public", help="Visibility of a new repository.")]
ClusterAt = Annotated[
    str | None,
    typer.Option("--cluster", help="Run on a Ray cluster (extra 'ray'): local, host:6379 or ray://host:10001."),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Workers on the cluster; default: one per GPU, or per CPU.")]
Together = Annotated[
    int | None,
    typer.Option(min=1, help="People trained together on a worker (default 32); affects rounding."),
]
Track = Annotated[
    str | None, typer.Option("--track", help="Also log losses and rates to tensorboard, wandb or trackio.")
]


MERGE_AND_STACK = frozenset({"merge", "stack"})
MACHINE_SETTINGS = frozenset(
    {"base", "encoder", "dtype", "device", "memory", "gradient_checkpointing", "max_tokens", "seed"}
)


def settings(
    config: Path | None,
    words: list[str] | None,
    *,
    task: str | None = None,
    base: str | None = None,
    seed: int | None = None,
    device: str | None = None,
) -> Run:
    """Return the run's settings: the file, overridden by words, overridden by options."""
    from mta.config import Run, load_settings

    # JSON keeps strings: plain YAML would read a folder named 2024 or yes as a number or a boolean.
    over = {"task": task, "base": base, "seed": seed, "device": device}
    given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in over.items() if value is not None]
    return load_settings(Run, config, [*(words or []), *given])


def open_bank(
    folder: Path,
    words: list[str] | None = None,
    seed: int | None = None,
    device: str | None = None,
    config: Path | None = None,
    open_to: frozenset[str] = frozenset(),
    weights: bool = True,
) -> tuple[BaseModel, Bank, Run]:
    """Return the base of a bank, the bank, and its settings, changed by ``config``, ``words``, ``seed`` and ``device``.

    Without ``weights`` the base is an outline, which computes nothing. Only the settings in ``open_to`` and
    ``MACHINE_SETTINGS`` may change. Raises ConfigError for all other settings, which would have no effect.
    """
    from mta.bank.bank import Bank
    from mta.bank.format import check_base, read_info
    from mta.config import override
    from mta.data.tasks import load_task
    from mta.errors import ConfigError
    from mta.model.base import BaseModel

    given = [f"{key}={value}" for key, value in {"seed": seed, "device": device}.items() if value is not None]
    info = read_info(folder)
    built = info.run
    run = override(built, [*(words or []), *given], config)
    settled = set(type(run).model_fields) - MACHINE_SETTINGS - open_to
    if run.task != built.task and load_task(run.task).identity == task_of(folder).identity:
        settled -= {"task"}  # the same task under another name
    if changed := sorted(name for name in settled if getattr(run, name) != getattr(built, name)):
        raise ConfigError(
            f"{changed[0]!r} cannot be changed here: the bank or the states were made with it",
            hint=f"Settings that can be changed here: {', '.join(sorted(MACHINE_SETTINGS | open_to))}.",
        )
    load = BaseModel.of if weights else BaseModel.outline
    base = load(run, partial(check_base, folder, info, run.base))
    return base, Bank.open(folder, base), run


@contextmanager
def executor_at(cluster: str | None, workers: int | None, together: int | None = None) -> Iterator[Executor]:
    """Yield the executor: this process, or the workers of a cluster until the block ends."""
    from mta.distributed.executor import LocalExecutor
    from mta.distributed.ray import Cluster
    from mta.errors import InputError

    if cluster is None:
        if workers is not None or together is not None:
            raise InputError(
                "--workers and --together need --cluster", hint="For example:  --cluster local --workers 4"
            )
        yield LocalExecutor()
        return
    with Cluster(cluster, workers=workers, most=together or 32) as found:
        yield found


def task_of(folder: Path) -> TaskType:
    """Return the task of a bank without loading a model, so that people can be read and checked first."""
    from mta.bank.format import read_info
    from mta.data.tasks import Task

    return Task.model_validate(read_info(folder).task)


def check_out(out: Path | None) -> None:
    """Raise InputError if a folder cannot be written, before hours of work are lost."""
    from mta.errors import InputError

    if out is None:
        return
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(
            f"{out} cannot be written: {there} is not a writable folder", hint="Choose another folder with --out."
        )


def tracked(name: str | None, folder: Path | None) -> Opener | None:
    """Return the function that opens the tracker ``name`` for a run in ``folder``; None without a name.

    Raises InputError for an unknown tracker, a missing folder, or a folder that cannot be written.
    """
    from mta.errors import InputError
    from mta.tracking.trackers import tracker

    check_out(folder)
    if name and not folder:
        raise InputError(
            "--track needs a folder for the run", hint="Give --out FOLDER (mta personalize: --run FOLDER)."
        )
    return tracker(name) if name else None


def kept_over(
    kind: str,
    base: BaseModel,
    bank: Bank,
    settings: Mapping[str, Any],
    folder: Path | None,
    *,
    track: Opener | None,
    on_step: OnStep,
    work: str = "",
) -> RunFolder:
    """Return the folder of a run that uses a bank. Other arguments as in ``RunFolder``."""
    from mta.tracking.run_folder import RunFolder

    return RunFolder(
        folder=folder,
        kind=kind,
        base=base,
        settings=settings,
        command=typed(),
        work=work,
        about={"bank": bank.hash[:12], "seeds": [settings["seed"]]},
        track=track,
        on_step=on_step,
    )


def typed() -> str:
    """Return the command as it was typed, with passwords in URLs replaced by ``***``."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", shlex.join(["mta", *sys.argv[1:]]))


def show_parcel(parcel: Parcel, to: str, private: bool, err: bool) -> None:
    """Print the files and facts that would be sent, so that the user can decide."""
    sizes = parcel.sizes()
    lines = [f"To {to}, {'private' if private else 'PUBLIC'}: {len(sizes)} files, {sum(sizes.values()):,} bytes"]
    lines += [f"  {size:>14,}  {name}" for name, size in sizes.items()]
    lines += [f"{name}: {fact}" for name, fact in parcel.facts.items()]
    typer.echo("\n".join(lines), err=err)


def agreed(yes: bool) -> None:
    """Ask for confirmation to send. Raises InputError without a terminal, Abort if the user declines."""
    from mta.errors import InputError

    if yes:
        return
    if not sys.stdin.isatty():
        raise InputError(
            "nothing was sent: stdin is not a terminal, so mta cannot ask for confirmation",
            hint="Read the list above, then repeat the command with --yes.",
        )
    typer.echo("Send this? [y/N] ", nl=False, err=True)  # typer.confirm would write to stdout too
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise typer.Abort


def show_json(value: object) -> None:
    """Print a result as JSON on stdout."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
