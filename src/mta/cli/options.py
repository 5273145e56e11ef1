"""Options that several verbs share."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
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
    from mta.tracking.run_folder import RunFolder
    from mta.tracking.trackers import Track as Opener

Words = Annotated[list[str] | None, typer.Argument(help="Settings as key=value, for example memory=8GiB.")]
Config = Annotated[Path | None, typer.Option("--config", help="Settings in YAML.", dir_okay=False)]
Seed = Annotated[int | None, typer.Option(help="Seed of everything that is drawn.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Task = Annotated[
    str | None,
    typer.Option(help="A built-in task (lamp1 … lamp7, movielens-rating, text) or a YAML file; default: text."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, or auto.")]
SkipBad = Annotated[Path | None, typer.Option(help="Write bad rows to this file and read on.", dir_okay=False)]


def bank_at(name: Path) -> Path:
    """The folder of a bank: as given, or downloaded by its hub id where no such folder exists."""
    from mta.bank.publish import bank_folder

    return name if name.exists() else bank_folder(name)


BankDir = Annotated[Path, typer.Option("--bank", help="Folder or hub id of a bank.", callback=bank_at)]
StoreUrl = Annotated[str, typer.Option("--store", help="Where people's states are kept: a folder or any fsspec URL.")]
Yes = Annotated[bool, typer.Option("--yes", help="Send without asking, for scripts.")]
Private = Annotated[bool, typer.Option("--private/--public", help="Who may see a repository that is created.")]
ClusterAt = Annotated[
    str | None,
    typer.Option("--cluster", help="Work on Ray (extra 'ray'): local, host:6379 or ray://host:10001."),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Workers on the cluster; default: all its CPUs, or GPUs.")]
Together = Annotated[
    int | None,
    typer.Option(min=1, help="People a worker trains together (32): how results are rounded depends on it."),
]
Track = Annotated[
    str | None, typer.Option("--track", help="Tell losses and rates to tensorboard, wandb or trackio as well.")
]


MERGE_AND_STACK = frozenset({"merge", "stack"})
OF_THE_MACHINE = frozenset(
    {"base", "encoder", "dtype", "device", "memory", "gradient_checkpointing", "max_tokens", "seed"}
)


def settings(config: Path | None, words: list[str] | None, **over: Any) -> Run:
    """The run's settings: file, then words, then options that were given."""
    from mta.config import Run, load_settings

    # As JSON, which YAML reads back as it was: a folder may be called 2024 or yes.
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
    """A bank with the base it was built for; ``config`` and ``words`` change the settings it carries.

    Without ``weights`` the base is an outline, which computes nothing.
    What a verb is ``open_to`` can be changed, and how this machine computes. Raises ConfigError for all else, which
    would be ignored.
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
    settled = set(type(run).model_fields) - OF_THE_MACHINE - open_to
    if run.task != built.task and load_task(run.task).identity == task_of(folder).identity:
        settled -= {"task"}  # the same by another name
    if changed := sorted(name for name in settled if getattr(run, name) != getattr(built, name)):
        raise ConfigError(
            f"{changed[0]!r} cannot be changed here: it was settled when bank or states were made",
            hint=f"What can be changed: {', '.join(sorted(OF_THE_MACHINE | open_to))}.",
        )
    load = BaseModel.of if weights else BaseModel.outline
    base = load(run, partial(check_base, folder, info, run.base))
    return base, Bank.open(folder, base), run


@contextmanager
def executor_at(cluster: str | None, workers: int | None, together: int | None = None) -> Iterator[Executor]:
    """What works through the work: this process, or a cluster's workers until the block ends."""
    from mta.distributed.executor import LocalExecutor
    from mta.distributed.ray import Cluster
    from mta.errors import InputError

    if cluster is None:
        if workers is not None or together is not None:
            raise InputError("--workers and --together are a cluster's", hint="Say which:  --cluster local --workers 4")
        yield LocalExecutor()
        return
    with Cluster(cluster, workers=workers, most=together or 32) as found:
        yield found


def task_of(folder: Path) -> TaskType:
    """The task a bank was built for: people can be read, and found wrong, before a model is loaded."""
    from mta.bank.format import read_info
    from mta.data.tasks import Task

    return Task.model_validate(read_info(folder).task)


def check_out(out: Path | None) -> None:
    """Raises InputError where a folder cannot be written: an hour later would be too late to hear of it."""
    from mta.errors import InputError

    if out is None:
        return
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(
            f"{out} cannot be written: {there} is no folder that can", hint="Choose another folder with --out."
        )


def tracked(name: str | None, folder: Path | None) -> Opener | None:
    """What opens the sink of that name for a run kept in ``folder``; None without a name.

    Raises InputError; also where the folder cannot be written.
    """
    from mta.errors import InputError
    from mta.tracking.trackers import tracker

    check_out(folder)
    if name and not folder:
        raise InputError(
            "--track goes with a folder that keeps the run", hint="Give one: --out (mta personalize: --run)."
        )
    return tracker(name) if name else None


def kept_over(bank: Bank, kind: str, **how: Any) -> RunFolder:
    """The folder of a run over a bank: see ``RunFolder`` for what else it takes."""
    from mta.tracking.run_folder import RunFolder

    about = {"bank": bank.hash[:12], "seeds": [how["settings"]["seed"]]}
    return RunFolder(kind=kind, command=typed(), about=about, **how)


def typed() -> str:
    """The command as it was typed, for whoever wants the same again; a password in an address is left out."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", shlex.join(["mta", *sys.argv[1:]]))


def show_parcel(parcel: Parcel, to: str, private: bool, err: bool) -> None:
    """What would leave this machine, for whoever has to decide."""
    sizes = parcel.sizes()
    lines = [f"To {to}, {'private' if private else 'PUBLIC'}: {len(sizes)} files, {sum(sizes.values()):,} bytes"]
    lines += [f"  {size:>14,}  {name}" for name, size in sizes.items()]
    lines += [f"{name}: {fact}" for name, fact in parcel.facts.items()]
    typer.echo("\n".join(lines), err=err)


def agreed(yes: bool) -> None:
    """Ask whether what was shown may leave. Raises InputError where nobody can be asked, Abort for a no."""
    from mta.errors import InputError

    if yes:
        return
    if not sys.stdin.isatty():
        raise InputError(
            "nothing was sent: whether this may leave the machine cannot be asked here, for it is no terminal",
            hint="Read the list above, then repeat the command with --yes.",
        )
    typer.echo("Send this? [y/N] ", nl=False, err=True)  # typer.confirm would write to stdout too
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise typer.Abort


def show_json(value: object) -> None:
    """Machine-readable result on stdout."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
