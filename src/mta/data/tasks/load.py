"""Load tasks: built-in ones by name, custom ones from a file."""

from __future__ import annotations

import difflib
import os
import re
from functools import cache
from pathlib import Path

from mta.config.loader import checked, read_yaml
from mta.data.tasks.task import RESERVED, Task
from mta.errors import ConfigError, TaskError

_FOLDER = Path(__file__).parent / "builtin"
ALIASES = {"lamp2m": "lamp2", "movielens": "movielens-rating"}  # papers call the newer LaMP-2 LaMP-2M


def _key(name: str) -> str:
    plain = re.sub(r"[-_ ]", "", name.lower())
    return ALIASES.get(plain, plain).replace("-", "")


def task_names() -> tuple[str, ...]:
    """Return the names of the built-in tasks."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def load_task(name: str | Path | Task) -> Task:
    """Return a built-in task by name ('lamp3', 'LaMP-3', and 'LaMP_3' are equal) or the task of a YAML file.

    Raises TaskError.
    """
    if isinstance(name, Task):
        return name
    if file := task_file(name):
        return _read_task(file)
    name = str(name)
    known = {_key(builtin): builtin for builtin in task_names()}
    if _key(name) in known:
        return _builtin(known[_key(name)])
    near = difflib.get_close_matches(_key(name), known, n=1)
    hint = f"Did you mean {known[near[0]]!r}? " if near else ""
    raise TaskError(
        f"unknown task {name!r}; built-in tasks: {', '.join(task_names())}",
        hint=hint + "For a task of your own, give the path of a .yaml file.",
    )


def task_file(name: str | Path) -> Path | None:
    """Return the YAML file that the name of a task of one's own is; None for a built-in task."""
    own = isinstance(name, Path) or name.endswith((".yaml", ".yml"))
    return Path(os.path.expanduser(name)) if own else None


@cache
def _builtin(name: str) -> Task:
    return _read_task(_FOLDER / f"{name}.yaml")


def _read_task(path: Path) -> Task:
    if not path.exists():
        raise TaskError(f"no such task file: {path}", hint=f"Built-in tasks: {', '.join(task_names())}")
    try:
        task = checked(Task, read_yaml(path), str(path))
    except ConfigError as error:
        raise TaskError(
            error.message,
            hint=f"{error.hint}\n  See docs/how-to/add-a-task.md, or a valid task: {_FOLDER / 'lamp3.yaml'}",
        ) from None
    if taken := sorted(RESERVED & {*task.fields(), *task.fields(query=True)}):
        raise TaskError(
            f"{path}: a field cannot be called {taken[0]!r}: mta itself uses the names {', '.join(sorted(RESERVED))}",
            hint="Rename the field in the task, and the column in the file.",
        )
    return task
