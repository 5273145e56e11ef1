"""``mta demo``: the whole method on MovieLens, from open weights to a report, by a recipe anybody can copy."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch
import yaml

from mta import assets
from mta.bank.bank import Bank
from mta.base import BaseModel, gemm_rate
from mta.config import Evaluation, Run, Settings, checked, override
from mta.errors import ConfigError
from mta.evaluation.study import Study, ask, study
from mta.evidence import OnStep
from mta.history import Person
from mta.personalize import Personalizer
from mta.readers import read_people
from mta.splits import Splits, draw

SLOW = 400e9  # bfloat16 operations per second below which the short version is run


class People(Settings):
    """How many people take which part; the rest are candidates for anchors."""

    task: int
    development: int
    test: int


class Recipe(Settings):
    """A demo or an experiment in one file: data, people, settings, and what to change on a slow machine."""

    data: str
    people: People
    run: Run
    evaluation: Evaluation
    question: dict[str, str]
    minutes: dict[str, float]
    short: tuple[str, ...] = ()


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by name (those in the package) or by path. Raises ConfigError."""
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else None
    try:
        packaged = resources.files("mta") / "recipes" / f"{name}.yaml"
        text = path.read_text(encoding="utf-8") if path else packaged.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"no recipe {str(name)!r}", hint="Give the path of a .yaml, or: movielens") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"recipe {name} is not readable YAML: {error}") from None
    return checked(Recipe, values, f"recipe {name}")


def demo(
    out: Path,
    recipe: Recipe,
    command: str,
    *,
    on_step: OnStep | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Study:
    """Bank, evaluation, personalization and report under ``out``; a stopped demo goes on where it was."""
    recipe = _for_this_machine(recipe, say)
    run = recipe.run
    say(f"1/5  assets: {run.base}, {run.encoder}, {recipe.data}")
    for name in (run.base, run.encoder, recipe.data):
        if assets.is_asset(name):
            assets.fetch(name, say)
    people = read_people(assets.resolve(recipe.data), run.task)
    splits = _splits(out, people, recipe)
    base = BaseModel.load(run.base, run.dtype, run.device, run.max_tokens)

    parts = f"task LoRA on {len(splits.task)} people, {run.bank.anchors} anchors of {len(splits.candidates)} candidates"
    say(f"2/5  bank: {parts}")
    task_people, candidates = splits.select("task", people), splits.select("candidates", people)
    bank = Bank.build(base, candidates, out / "bank", task=run.task, run=run, task_people=task_people, on_step=on_step)

    say(f"3/5  {len(splits.test)} held-out people with {recipe.evaluation.shots} shots each, every method")
    tested = splits.select("test", people)
    found = study(base, bank, run, tested, recipe.evaluation, on_step=on_step, on_method=lambda m: say(f"     {m}"))

    say("4/5  the same question for three people, before and after")
    personal = Personalizer(base, bank, out / "people", run=run)
    three = _three(found)
    personal.personalize([found.panel.people[i] for i in three], on_step=on_step)
    ask(found, personal, recipe.question, three)

    say(f"5/5  {out / 'report.html'}")
    found.meta["data"] = recipe.data
    if assets.is_asset(recipe.data):
        found.meta["data_note"] = assets.ASSETS[recipe.data].note
    found.write(out, command)
    return found


def _for_this_machine(recipe: Recipe, say: Callable[[str], None]) -> Recipe:
    """The recipe, or its short version where bfloat16 is slow."""
    if torch.cuda.is_available():
        return recipe
    rate = max(gemm_rate(torch.bfloat16), gemm_rate(torch.float32))
    minutes = sum(recipe.minutes.values())
    if rate >= SLOW or not recipe.short:
        say(f"This machine multiplies {rate / 1e9:.0f} GFLOP/s: the full recipe, about {minutes:.0f} minutes.")
        return recipe
    changes = ", ".join(recipe.short)
    say(f"This machine multiplies only {rate / 1e9:.0f} GFLOP/s: the same path with fewer steps ({changes}).")
    return override(recipe, recipe.short)


def _splits(out: Path, people: list[Person], recipe: Recipe) -> Splits:
    path = out / "splits.json"
    if path.is_file():
        return Splits.load(path, people)
    sizes = recipe.people.model_dump()
    splits = draw(people, recipe.run.seed, **sizes, min_items=recipe.evaluation.shots + recipe.evaluation.queries)
    path.parent.mkdir(parents=True, exist_ok=True)
    splits.save(path)
    return splits


def _three(found: Study) -> list[int]:
    """The people whose shots are lowest, middle and highest on average: chosen without a look at their queries."""
    task = found.panel.bank.task

    def mean(i: int) -> float:
        items = found.panel.people[i].items
        return sum(float(task.target(item)) for item in items) / len(items)

    order = sorted(range(len(found.panel.people)), key=mean)
    return [order[0], order[len(order) // 2], order[-1]]
