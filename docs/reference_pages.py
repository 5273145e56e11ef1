"""The reference that is made from the code: verbs, settings, tasks, errors; `docs/conf.py` writes the pages."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import typer
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.cli import get_docs_for_click

from mta import errors as tree
from mta.cli.app import app
from mta.cli.options import MACHINE_SETTINGS
from mta.config import CompareSettings, Run, Settings
from mta.data.tasks import load_task, task_names
from mta.tools.demo import DemoRecipe
from mta_lab.cli import app as lab
from mta_lab.experiments.recipe import Experiment
from mta_lab.privacy.settings import AttackSettings


def write_all(folder: Path) -> None:
    """Write the pages; a page that says the same already is left alone, so that nothing is built for nothing."""
    for name, text in {"cli": verbs(), "settings": settings(), "tasks": tasks(), "errors": errors()}.items():
        page = folder / f"{name}.md"
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def verbs() -> str:
    """Every verb with its arguments, as its help has them."""
    text = ""
    for name, one, title in (("mta", app, "Command line"), ("mta-lab", lab, "The laboratory")):
        command = typer.main.get_command(one)
        context = command.make_context(name, [], resilient_parsing=True)
        text += get_docs_for_click(obj=command, ctx=context, name=name, title=title)
    text = re.sub(r"(?m)^(?:\s*Example:  .*\n?)+", _example, text)
    return re.sub(r"(?m)^\* `(.*?)`: ", r"- `\1`: ", text).replace("...`:", " …`:")


def _example(found: re.Match[str]) -> str:
    lines = "\n".join(line.strip().removeprefix("Example:  ") for line in found[0].strip().splitlines())
    return f"\n```text\n{lines}\n```\n"


def settings() -> str:
    """Every ``key=value`` word, its default, and what may be given."""
    text = (
        "# Settings\n\nGive settings as `key=value` after a command (`merge.policy=ridge`), or in a YAML file with "
        "`--config`; no value is written `null`. A bank holds the settings it was built with. For a bank that exists "
        "you can change:\n\n"
        "- `merge.…` and `stack.…` (`mta personalize`, `compare`, `serve`, `mta-lab attack`);\n"
        "- `calibration.…` (`mta bank calibrate`; of the following it takes only `base`, `device`, `memory`, and "
        "`gradient_checkpointing`);\n"
        f"- {', '.join(f'`{name}`' for name in sorted(MACHINE_SETTINGS))}.\n\n"
        "Other changes are an error: build another bank.\n\n"
    )
    for title, kind in {
        "A run": Run,
        "A comparison: `mta compare`": CompareSettings,
        "An attack: `mta-lab attack`": AttackSettings,
        "A recipe: `mta-lab evaluate RECIPE`": Experiment,
        "A demo: `mta demo`": DemoRecipe,
    }.items():
        text += f"## {title}\n\n{inspect.getdoc(kind)}\n\n| key | default | what it is |\n|---|---|---|\n"
        text += "".join(f"| `{key}` | {default} | {what} |\n" for key, default, what in _rows(kind)) + "\n"
    return text


def _rows(kind: type[Settings], before: str = "", default: Settings | None = None) -> Iterator[tuple[str, str, str]]:
    for name, field in kind.model_fields.items():
        group = (
            field.annotation if inspect.isclass(field.annotation) and issubclass(field.annotation, Settings) else None
        )
        value = getattr(default, name) if default is not None else field.default
        if group in (Run, CompareSettings):
            yield f"{before}{name}.…", "", f"settings of a {'run' if group is Run else 'comparison'}, above"
        elif group:
            yield from _rows(group, f"{before}{name}.", value if isinstance(value, Settings) else None)
        else:
            yield before + name, "required" if value is PydanticUndefined else f"`{_plain(value)}`", _what(field)


def _plain(value: object) -> str:
    return (
        "null"
        if value is None
        else yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
        .removesuffix("...\n")
        .strip()
    )


def _what(field: FieldInfo) -> str:
    bounds = [f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in _SIGNS.items() if hasattr(m, name)]
    choices = re.findall(r"'([^']+)'", str(field.annotation)) if "Literal" in str(field.annotation) else []
    said = [field.description or "", ", ".join(choices), ", ".join(bounds)]
    return "; ".join(part for part in said if part)


_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def tasks() -> str:
    """The built-in tasks, as the files that they are."""
    text = (
        "# Tasks\n\nA task is YAML: how an item is put to the model, what its answer is, and how answers are judged. "
        "[Yours](../how-to/add-a-task.md) is another such file.\n\n"
    )
    for name in task_names():
        task = load_task(name)
        values = task.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        shown = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
        text += (
            f"## {name}\n\n{task.description}. {task.source[:1].upper()}{task.source[1:]}.\n\n```yaml\n{shown}```\n\n"
        )
    return text


def errors() -> str:
    """The tree of errors as its module draws it, and each with what it means."""
    drawing, _, rest = inspect.getdoc(tree).partition("\n\n")[2].partition("\n\n")
    said = rest.partition("To add one")[0].strip().replace("``", "`")
    text = (
        "# Errors\n\nThe command line prints an error and exits with 1. Other exit codes: 2 for wrong usage, 3 "
        "where `mta forget` is incomplete ([table](../how-to/forget.md#steps)), 130 after Ctrl-C, and 128 plus the "
        "signal's number after SIGTERM and SIGHUP. In Python each error is a "
        "class of `mta.errors`; below the tree are the modules of the server's errors.\n\n"
        f"```text\n{drawing}\n```\n\n{said}\n\n"
    )
    return text + "".join(
        f"`{name}`\n: {inspect.getdoc(kind)}\n\n".replace("``", "`")
        for name, kind in vars(tree).items()
        if inspect.isclass(kind) and issubclass(kind, tree.MtaError)
    )
