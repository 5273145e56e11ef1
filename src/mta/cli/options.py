"""Options that several verbs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mta.bank.bank import Bank
    from mta.base import BaseModel
    from mta.config import Run
    from mta.tasks import Task as TaskType

Words = Annotated[list[str] | None, typer.Argument(help="Settings as key=value: merge.policy=ridge memory=8GiB.")]
Config = Annotated[Path | None, typer.Option("--config", help="Settings in YAML.", dir_okay=False)]
Seed = Annotated[int | None, typer.Option(help="Seed of everything that is drawn.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Task = Annotated[
    str | None,
    typer.Option(help="A built-in task (lamp1 … lamp7, movielens-rating, text) or a YAML file; default: text."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, or auto.")]
SkipBad = Annotated[Path | None, typer.Option(help="Write bad rows to this file and read on.", dir_okay=False)]
BankDir = Annotated[Path, typer.Option("--bank", help="Folder of a bank.")]
StoreUrl = Annotated[str, typer.Option("--store", help="Where people's states are kept: a folder or any fsspec URL.")]


def settings(config: Path | None, words: list[str] | None, **over: Any) -> Run:
    """The run's settings: file, then words, then options that were given."""
    from mta.config import Run, load_settings

    # As JSON, which YAML reads back as it was: a folder may be called 2024 or yes.
    given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in over.items() if value is not None]
    return load_settings(Run, config, [*(words or []), *given])


def load_base(run: Run) -> BaseModel:
    """The base a run names."""
    from mta.base import BaseModel

    return BaseModel.load(run.base, run.dtype, run.device, run.max_tokens)


def open_bank(
    folder: Path, words: list[str] | None, seed: int | None, device: str | None
) -> tuple[BaseModel, Bank, Run]:
    """A bank with the base it was built for; ``words`` change the settings it carries (merge and stack, say)."""
    from mta.bank.bank import Bank
    from mta.bank.files import read_info
    from mta.config import override

    given = [f"{key}={value}" for key, value in {"seed": seed, "device": device}.items() if value is not None]
    run = override(read_info(folder).run, [*(words or []), *given])
    base = load_base(run)
    return base, Bank.open(folder, base), run


def task_of(folder: Path) -> TaskType:
    """The task a bank was built for: people can be read, and found wrong, before a model is loaded."""
    from mta.bank.files import read_info
    from mta.tasks import Task

    return Task.model_validate(read_info(folder).task)


def show_json(value: object) -> None:
    """Machine-readable result on stdout."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
