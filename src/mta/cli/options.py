"""Options of several commands, and what they name: settings, people, banks, executors."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

import mta
from mta.config import Run, override
from mta.config.constants import ROUNDING_ONLY
from mta.data.history import Person
from mta.data.readers import read_people
from mta.data.tasks import Task as TaskType
from mta.data.tasks import load_task
from mta.distributed.executor import Executor, LocalExecutor
from mta.errors import ConfigError, InputError
from mta.system.progress import OnStep

if TYPE_CHECKING:
    from mta.tracking.run_folder import RunFolder

MERGE_AND_STACK = frozenset({"merge", "stack"})
MACHINE_SETTINGS = ROUNDING_ONLY | {"base", "encoder", "dtype", "max_tokens", "seed"}


def bank_at(name: Path) -> Path:
    """Return the folder of a bank; download the bank by its hub id if no such folder exists."""
    from mta.bank.publish import bank_folder

    return bank_folder(name)


Source = Annotated[
    str, Argument(help="A file (JSONL, CSV, Parquet, LaMP, Per-Pcs), a RecBole folder, movielens-100k or survey.")
]
Columns = Annotated[
    list[str] | None,
    Option(
        "--columns",
        help="Map names to the file's columns: person=uid,output=stars. Names: person, input, output, time, and the "
        "task's fields. Can be repeated.",
    ),
]
Words = Annotated[list[str] | None, Argument(help="Settings as key=value, for example memory=8GiB.")]
RecipeWords = Annotated[list[str] | None, Argument(help="Settings as key=value, for example run.memory=8GiB.")]
PersonId = Annotated[str, Argument(help="Person id.")]
BankDir = Annotated[Path, Option("--bank", help="Folder or hub id of a bank.", callback=bank_at)]
StoreUrl = Annotated[str, Option("--store", help="Store of people's states: a folder or an fsspec URL.")]
Config = Annotated[Path | None, Option("--config", help="YAML file with settings.", dir_okay=False)]
Task = Annotated[
    str | None,
    Option(
        help="A built-in task (lamp1 to lamp5, lamp2n, lamp7, movielens-rating, survey, text) or a YAML file; default: "
        "text."
    ),
]
Seed = Annotated[int | None, Option(help="Seed of all random draws.")]
Device = Annotated[str | None, Option(help="cpu, cuda, or auto.")]
SkipBad = Annotated[Path | None, Option(help="Write bad rows to this file, and continue.", dir_okay=False)]
Json = Annotated[bool, Option("--json", help="Print the result as JSON on stdout.")]
Private = Annotated[bool, Option("--private/--public", help="Visibility of a new repository.")]
ClusterAt = Annotated[
    str | None, Option("--cluster", help="Run on a Ray cluster (extra 'ray'): local, host:6379 or ray://host:10001.")
]
Workers = Annotated[int | None, Option(min=1, help="Number of workers; default: one per GPU, else one per CPU.")]
Together = Annotated[
    int | None, Option(min=1, help="Number of people that a worker trains together (default 32). Affects rounding.")
]


def as_words(**options: object) -> list[str]:
    """Return the options that were given as key=value."""
    # JSON keeps strings: plain YAML would read a folder named 2024 or yes as a number or a boolean.
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items() if value is not None]


def settings(config: Path | None, words: list[str] | None, **options: object) -> Run:
    """Return the run's settings: the file, overridden by words, overridden by options."""
    return override(Run(), [*(words or []), *as_words(**options)], config)


def columns_in(given: Sequence[str] | None) -> dict[str, str]:
    """Return what ``--columns`` names: person, input, output, time, or a field -> its column. Raises InputError."""
    columns: dict[str, str] = {}
    for pair in (pair for pairs in given or () for pair in re.split(r",(?=[^,]*=)", pairs)):  # names may have commas
        name, equals, column = (part.strip() for part in pair.partition("="))
        if not (name and equals and column):
            raise InputError(
                f"--columns has {pair!r}; expected a name, =, and a column",
                hint="Give names and columns of the file:  --columns person=uid,output=stars",
            )
        columns[name] = column
    return columns


def people_in(
    source: str, task: str | TaskType, columns: Sequence[str] | None, skip_bad: Path | None, questions: bool = False
) -> list[Person]:
    """Return all people of a file, a folder, or a data asset; ``questions`` as in ``read_people``."""
    return read_people(source, task, columns=columns_in(columns), skip_bad=skip_bad, questions=questions)


def task_of(folder: Path) -> TaskType:
    """Return the task of a bank without loading a model, so that people can be read and checked first."""
    from mta.bank.format import read_info

    return read_info(folder).task


def open_bank(
    folder: Path,
    words: list[str] | None = None,
    *,
    seed: int | None = None,
    device: str | None = None,
    config: Path | None = None,
    beside: Container[str] = (),
    open_to: frozenset[str] = frozenset(),
    machine: frozenset[str] = MACHINE_SETTINGS,
    weights: bool = True,
) -> tuple[mta.BaseModel, mta.Bank, Run]:
    """Return the base of a bank, the bank, and its settings, changed by ``config``, ``words``, ``seed`` and ``device``.

    ``beside`` are keys of other settings in that file. Without ``weights`` the base is an outline, which computes
    nothing. Only the settings in ``open_to`` and ``machine`` may change. Raises ConfigError for all other settings,
    which would have no effect.
    """
    from mta.bank.format import check_base, read_info

    info = read_info(folder)
    built = info.run
    run = override(built, [*(words or []), *as_words(seed=seed, device=device)], config, beside=beside)
    fixed = set(Run.model_fields) - machine - open_to
    if run.task != built.task and load_task(run.task).identity == info.task.identity:
        fixed -= {"task"}  # the same task under another name
    if changed := sorted(name for name in fixed if getattr(run, name) != getattr(built, name)):
        raise ConfigError(
            f"{changed[0]!r} cannot be changed here: the bank or the states were made with it",
            hint=f"Settings that can be changed here: {', '.join(sorted(machine | open_to))}.",
        )
    load = mta.BaseModel.of if weights else mta.BaseModel.outline
    base = load(run, partial(check_base, folder, info, run.base))
    return base, mta.Bank.open(folder, base), run


@contextmanager
def executor_at(
    cluster: str | None, workers: int | None, device: str, together: int | None = None
) -> Iterator[Executor]:
    """Yield the executor: this process, or the workers of a cluster until the block ends; for the CPU, without GPUs."""
    if cluster:
        from mta.distributed.ray import Cluster

        with Cluster(cluster, workers=workers, most=together or 32, gpu=False if device == "cpu" else None) as executor:
            yield executor
    elif workers or together:
        raise InputError("--workers and --together need --cluster", hint="For example:  --cluster local --workers 4")
    else:
        yield LocalExecutor()


def check_written(task: TaskType, write: bool, max_new_tokens: int | None) -> None:
    """Raise InputError for the length of generated answers where labels are scored."""
    if task.labels and not write and max_new_tokens:
        raise InputError(
            f"--max-new-tokens has no effect: task {task.name!r} has labels, which are scored",
            hint="Leave it out, or generate text instead:  --write",
        )


def check_out(out: Path | None) -> None:
    """Raise InputError if a folder cannot be written, before hours of work are lost."""
    if out is None:
        return
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    try:
        with TemporaryFile(dir=there):  # permissions alone do not tell: root may write to all folders but /proc
            pass
    except OSError as error:
        raise InputError(
            f"{out} cannot be written: {there} is not a writable folder ({error.strerror})",
            hint="Choose another folder.",
        ) from None


def command_line(program: str = "mta") -> str:
    """Return the command as it was typed, without passwords."""
    return without_passwords(shlex.join([program, *sys.argv[1:]]))


def without_passwords(command: str) -> str:
    """Return a command with passwords in URLs replaced by ``***``, and user names, which may be tokens.

    In addresses of Azure, the name is a container.
    """
    command = re.sub(r"(?<=://)[^/\s]*:[^/\s]*@", "***@", command)
    return re.sub(r"\b(?!(?:abfss?|az|wasbs?)://)([a-z0-9+]+://)[^/@\s]+@", r"\1***@", command)


def run_folder(
    kind: str,
    folder: Path | None,
    base: mta.BaseModel,
    bank: mta.Bank,
    settings: Mapping[str, Any],
    on_step: OnStep,
    work: str = "",
) -> RunFolder:
    """Return the folder of a run that uses a bank. ``settings`` can be given back with --config."""
    from mta.tracking.run_folder import RunFolder

    return RunFolder(
        folder=folder,
        kind=kind,
        base=base,
        settings=settings,
        command=command_line(),
        work=work,
        about={"bank": bank.hash[:12], "seeds": settings.get("seeds") or [settings["seed"]]},
        on_step=on_step,
    )
