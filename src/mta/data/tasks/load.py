"""Load tasks: built-in ones by name, custom ones from a file."""

from __future__ import annotations

import difflib
import re
import reprlib
from functools import cache
from importlib import resources
from pathlib import Path

import yaml
from pydantic import ValidationError

from mta.data.tasks.form import Form
from mta.data.tasks.task import Task
from mta.errors import TaskError

_COMPARE = f"See docs/how-to/add-a-task.md, or a valid task: {Path(__file__).parent / 'builtin' / 'lamp3.yaml'}"
ALIASES = {"lamp2m": "lamp2", "movielens": "movielens-rating"}  # papers call the newer LaMP-2 LaMP-2M


def _key(name: str) -> str:
    plain = re.sub(r"[-_ ]", "", name.lower())
    return ALIASES.get(plain, plain).replace("-", "")


def task_names() -> tuple[str, ...]:
    """Return the names of the built-in tasks."""
    folder = resources.files("mta.data.tasks").joinpath("builtin")
    return tuple(sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")))


def load_task(name: str | Path | Task) -> Task:
    """Return a built-in task by name ('lamp3', 'LaMP-3', and 'LaMP_3' are equal) or the task of a YAML file.

    Raises TaskError.
    """
    if isinstance(name, Task):
        return name
    if isinstance(name, Path) or name.endswith((".yaml", ".yml")):
        return _read_task(Path(name))
    known = {_key(builtin): builtin for builtin in task_names()}
    if _key(name) in known:
        return _builtin(known[_key(name)])
    near = difflib.get_close_matches(_key(name), known, n=1)
    hint = f"Did you mean {known[near[0]]!r}? " if near else ""
    raise TaskError(
        f"unknown task {name!r}; built-in tasks: {', '.join(task_names())}",
        hint=hint + "For a task of your own, give the path of a .yaml file.",
    )


def with_limit(task: Task) -> Task:
    """Return the built-in task instead of its older version without ``answer_tokens``, as older banks hold it."""
    if task.answer_tokens is None and task.name in task_names() and _builtin(task.name).identity == task.identity:
        return _builtin(task.name)
    return task


@cache
def _builtin(name: str) -> Task:
    text = resources.files("mta.data.tasks").joinpath("builtin", f"{name}.yaml").read_text(encoding="utf-8")
    return _parse_task(text, f"built-in task {name}")


def _read_task(path: Path) -> Task:
    try:
        return _parse_task(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise TaskError(f"no such task file: {path}", hint=f"Built-in tasks: {', '.join(task_names())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(
            f"{path} cannot be read as text: {error}", hint="Save the file as UTF-8, or give another path."
        ) from None


def _parse_task(text: str, source: str) -> Task:
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2020-99-99
        raise TaskError(f"{source} is not readable YAML: {error}", hint=_COMPARE) from None
    if not isinstance(values, dict):
        raise TaskError(
            f"{source}: expected a mapping with name, item, text, metric; got {type(values).__name__}", hint=_COMPARE
        )
    try:
        return Task.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "task"
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            names = list((Form if len(first["loc"]) > 1 else Task).model_fields)
            near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1)
            reason = f"no such key; expected {f'{near[0]}, or ' if near else ''}one of {', '.join(names)}"
        got = "" if isinstance(first["input"], dict | Task | Form) else f" (got {_brief(first['input'])})"
        raise TaskError(f"{source}: {key}: {reason}{got}", hint=_COMPARE) from None


def _brief(value: object) -> str:
    """Return a shortened value for a message: YAML aliases can make the values of a short file huge."""
    brief = reprlib.Repr()
    vars(brief).update(maxlevel=2, maxlist=20, maxdict=20, maxstring=200, maxother=200)
    return brief.repr(value)
