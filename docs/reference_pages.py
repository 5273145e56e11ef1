"""The reference that is made from the code: verbs, settings, tasks; `docs/conf.py` writes the pages."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mta.cli.app import app
from mta.cli.options import MACHINE_SETTINGS
from mta.config import CompareSettings, Run, Settings
from mta.config.schema import Lora, Training
from mta.data.tasks import load_task, task_names
from mta_lab.cli import app as lab
from mta_lab.experiments.recipe import Experiment
from mta_lab.privacy.settings import AttackSettings


def write_all(folder: Path) -> None:
    """Write the pages; a page that says the same already is left alone, so that nothing is built for nothing."""
    for name, text in {"cli": verbs(), "settings": settings(), "tasks": tasks()}.items():
        page = folder / f"{name}.md"
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def verbs() -> str:
    """Every command with its parameters; what several commands share is listed once."""
    commands = {verb: one for name, root in (("mta", app), ("mta-lab", lab)) for verb, one in _commands(name, root)}
    lines = {verb: [_parameter(one) for one in command.params] for verb, command in commands.items()}
    times = Counter(line for of_one in lines.values() for line in of_one)
    shared: dict[str, str] = {}  # line -> name; of several lines about one name, the most common
    for line, n in times.most_common():
        if n > 1 and (name := line.partition("`: ")[0].removeprefix("- ")) not in shared.values():
            shared[line] = name
    text = (
        "# Command line\n\n`mta --version` prints the version. Results go to stdout, messages to stderr. `--help` of a "
        "command explains more than this page. Several commands have these common parameters; the sections below only "
        "name them. All commands have `--json`:\n\n" + "\n".join(shared) + "\n\n"
    )
    for verb, command in commands.items():
        about, *more = inspect.cleandoc(command.help or "").split("\n\n")
        examples = [line.removeprefix("Example:  ") for line in "\n".join(more).splitlines() if "Example:  " in line]
        text += f"## `{verb}`\n\n{about}\n\n```text\n{chr(10).join(map(str.strip, examples))}\n```\n\n"
        text += "".join(f"{line}\n" for line in lines[verb] if line not in shared)
        named = [f"{shared[line]}`" for line in lines[verb] if line in shared and "`--json`" not in line]
        text += f"- Common: {', '.join(named)}.\n\n" if named else "\n"
    return text


def _commands(path: str, root: typer.Typer) -> Iterator[tuple[str, Any]]:
    def below(name: str, one: Any) -> Iterator[tuple[str, Any]]:
        inner: dict[str, Any] = getattr(one, "commands", {})
        if not inner:
            yield name, one
        for word, child in inner.items():
            yield from below(f"{name} {word}", child)

    yield from below(path, typer.main.get_command(root))


def _parameter(one: Any) -> str:
    """Return a list item: an argument in capitals or the names of an option, its help, and its default."""
    said = one.help or ""
    if one.param_type_name == "argument":
        return f"- `{one.name.upper()}`: {said}"
    names = "`, `".join([*(name for name in one.opts if name.startswith("--")), *one.secondary_opts])
    if one.required:
        said += " Required."
    elif one.default and not one.is_flag:
        said += "" if "default" in said.lower() else f" Default: {one.default}."
    return f"- `{names}`: {said}"


def settings() -> str:
    """Every ``key=value`` word, its default, and what may be given."""
    text = (
        "# Settings\n\nGive settings as `key=value` after a command (`merge.policy=ridge`), or in a YAML file with "
        "`--config`. Write `null` for no value. A bank contains the settings that it was built with. For an existing "
        "bank, you can change:\n\n"
        "- `merge.…` and `stack.…` (`mta personalize`, `compare`, `serve`, `mta-lab attack`);\n"
        "- `calibration.…` (`mta bank calibrate`);\n"
        f"- {', '.join(f'`{name}`' for name in sorted(MACHINE_SETTINGS))}. Of these, `mta bank calibrate` and "
        "`rebuild` take only `base`, `device`, `memory`, and `gradient_checkpointing`.\n\n"
        "Other changes are an error: build a new bank. `mta demo` takes `run.…`, `evaluation.…` (a comparison), "
        "`people.task`, `people.development`, and `people.test`.\n\n"
    )
    for title, kind in {
        "A run": Run,
        "A LoRA: keys of `….lora`": Lora,
        "A training: keys of `….training`": Training,
        "A comparison: `mta compare`": CompareSettings,
        "An attack: `mta-lab attack`": AttackSettings,
        "A recipe: `mta-lab evaluate RECIPE`": Experiment,
    }.items():
        about = (inspect.getdoc(kind) or "").replace("``", "`")
        text += f"## {title}\n\n{about}\n\n| key | default | what it is |\n|---|---|---|\n"
        text += "".join(f"| `{key}` | {default} | {what} |\n" for key, default, what in _rows(kind)) + "\n"
    return text


TABLES = {Run: "a run", CompareSettings: "a comparison", Lora: "a LoRA", Training: "a training"}  # each has a table


def _rows(kind: type[Settings], before: str = "", default: Settings | None = None) -> Iterator[tuple[str, str, str]]:
    for name, field in kind.model_fields.items():
        group = (
            field.annotation if inspect.isclass(field.annotation) and issubclass(field.annotation, Settings) else None
        )
        value = getattr(default, name) if default is not None else field.default
        if group in TABLES:
            yield f"{before}{name}.…", _changed(value), f"{TABLES[group]} (own table)"
        elif group:
            yield from _rows(group, f"{before}{name}.", value if isinstance(value, Settings) else None)
        else:
            yield before + name, "required" if value is PydanticUndefined else f"`{_plain(value)}`", _what(field)


def _changed(value: object) -> str:
    """Return the settings of a group whose values differ from the defaults of the group's own table."""
    if not isinstance(value, Settings):
        return ""
    plain = {name: field.default for name, field in type(value).model_fields.items()}
    return ", ".join(
        f"`{name}={_plain(getattr(value, name))}`" for name in plain if getattr(value, name) != plain[name]
    )


def _plain(value: object) -> str:
    return (
        "null"
        if value is None
        else yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
        .removesuffix("...\n")
        .strip()
    )


def _what(field: FieldInfo) -> str:
    bounds = [f"{sign}{getattr(m, name)}" for m in field.metadata for name, sign in _SIGNS.items() if hasattr(m, name)]
    choices = re.findall(r"'([^']+)'", str(field.annotation)) if "Literal" in str(field.annotation) else []
    said = field.description or ""
    limits = [*bounds, *(choices if any(choice not in said for choice in choices) else [])]
    return f"{said} ({', '.join(limits)})".strip() if limits else said


_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def tasks() -> str:
    """The built-in tasks, as the files that they are."""
    text = (
        "# Tasks\n\nA task is a YAML file that defines prompts, answers, and scoring "
        "([add your own](../how-to/add-a-task.md)). This page omits patterns that parse LaMP's files, and examples for "
        "the playground.\n\n"
    )
    for name in task_names():
        task = load_task(name)
        said = {"name", "description", "source", "examples"}
        values = task.model_dump(mode="json", exclude_none=True, exclude_defaults=True, exclude=said)
        for part in (values["item"], values.get("query") or {}):
            part.pop("pattern", None)
        shown = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)
        text += f"## {name}\n\n{task.description}. Source: {task.source}.\n\n```yaml\n{shown}```\n\n"
    return text
