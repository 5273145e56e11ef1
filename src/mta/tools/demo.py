"""``mta demo``: run the whole method on MovieLens, from open weights to a report, with a recipe that can be copied."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import torch

from mta.bank.bank import Bank
from mta.config import Evaluation, Run, override
from mta.config.loader import Settings, checked, dump_yaml, read_yaml
from mta.data.history import Person
from mta.data.readers import read_people
from mta.data.splits import Splits, draw
from mta.errors import ConfigError
from mta.evaluation.compare import Study, ask, study
from mta.model.base import BaseModel
from mta.personalize import Personalizer
from mta.system import assets
from mta.system.atomic import write_text
from mta.system.device import gemm_rate
from mta.system.progress import OnStep
from mta.tracking.run_folder import RunFolder
from mta.tracking.trackers import Track

SLOW = 400e9  # operations per second; slower machines run the short version


class People(Settings):
    """Number of people in each part; the rest are candidates for anchors."""

    task: int
    development: int
    test: int


class Recipe(Settings):
    """A demo in one file: data, people, settings, and the settings to change on a slow machine (``short``)."""

    data: str
    people: People
    run: Run
    evaluation: Evaluation
    question: dict[str, str]
    minutes: dict[str, float]
    short: tuple[str, ...] = ()


def load_recipe(name: str | Path) -> Recipe:
    """Return a recipe of the package by name, or any recipe by path. Raises ConfigError."""
    packaged = Path(str(resources.files("mta"))) / "recipes" / f"{name}.yaml"
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else packaged
    if not path.is_file():
        raise ConfigError(f"no recipe {str(name)!r}", hint="Give the path of a .yaml, or: movielens")
    return checked(Recipe, read_yaml(path), f"recipe {name}")


def demo(
    out: Path,
    recipe: Recipe,
    command: str,
    words: Sequence[str] = (),
    *,
    on_step: OnStep | None = None,
    say: Callable[[str], None] = lambda _: None,
    track: Track | None = None,
) -> Study:
    """Build a bank, evaluate, personalize, and write a report under ``out``; a stopped demo resumes.

    ``words`` are settings that override the recipe and its short version. ``track`` opens an additional tracker of
    steps. Raises ConfigError if ``out`` holds a demo with other settings.
    """
    recipe = _settled(out, recipe, words, say)
    run = recipe.run
    say(f"1/5  assets: {run.base}, {run.encoder}, {recipe.data}")
    for name in (run.base, run.encoder, recipe.data):
        if name in assets.ASSETS:
            assets.fetch(name, say)
    people = read_people(assets.resolve(recipe.data), run.task)
    splits = _splits(out, people, recipe)
    base = BaseModel.of(run)
    with RunFolder(
        folder=out,
        kind="demo",
        base=base,
        settings=recipe.model_dump(mode="json"),
        config=False,
        command=command,
        track=track,
        on_step=on_step,
        about={"seeds": [run.seed]},
    ) as folder:
        found = _compared(out, recipe, people, splits, base, folder.step, say)
        three = _three(found)
        say("4/5  the same question for three people, before and after")
        personal = Personalizer(base, found.panel.bank, out / "people", run=run)
        personal.personalize([found.panel.people[i] for i in three], on_step=folder.step)
        ask(found, personal, recipe.question, three)
        folder.outcome = found.outcome()
        found.write(out, command)
    serve = ["mta", "serve", "--bank", str(out / "bank"), "--store", str(out / "people"), "--insecure-local"]
    ids = ", ".join(found.panel.people[i].id for i in three)
    say(f"5/5  {out / 'report.html'}")
    say(f"     To ask people {ids} yourself:  {shlex.join(serve)}   then open http://127.0.0.1:8000")
    return found


def _compared(
    out: Path,
    recipe: Recipe,
    people: list[Person],
    splits: Splits,
    base: BaseModel,
    on_step: OnStep,
    say: Callable[[str], None],
) -> Study:
    """Build the bank, and compare all methods on people outside the bank."""
    run = recipe.run
    parts = f"task LoRA on {len(splits.task)} people, {run.bank.anchors} anchors of {len(splits.candidates)} candidates"
    say(f"2/5  bank: {parts}")
    task_people, candidates = splits.select("task", people), splits.select("candidates", people)
    bank = Bank.build(base, candidates, out / "bank", task=run.task, run=run, task_people=task_people, on_step=on_step)

    say(f"3/5  {len(splits.test)} held-out people with {recipe.evaluation.shots} shots each, every method")
    tested = splits.select("test", people)
    found = study(base, bank, run, tested, recipe.evaluation, on_step=on_step, on_method=lambda m: say(f"     {m}"))
    found.meta["data"] = recipe.data
    if recipe.data in assets.ASSETS:
        found.meta["terms"] = assets.ASSETS[recipe.data].note
    return found


def _settled(out: Path, recipe: Recipe, words: Sequence[str], say: Callable[[str], None]) -> Recipe:
    """Return the recipe or its short version, with ``words`` applied; a resumed demo keeps its first choice."""
    full, short = override(recipe, words), override(recipe, [*recipe.short, *words])
    path = out / "recipe.yaml"
    if path.is_file():
        begun = load_recipe(path)
        if begun not in (full, short):
            raise ConfigError(
                f"{out} holds a demo with other settings ({path})", hint="Choose another folder with --out."
            )
        return begun
    chosen = _for_this_machine(full, short, say)
    write_text(path, dump_yaml(chosen))
    return chosen


def _for_this_machine(full: Recipe, short: Recipe, say: Callable[[str], None]) -> Recipe:
    if torch.cuda.is_available():
        return full
    rate = max(gemm_rate(torch.bfloat16), gemm_rate(torch.float32))
    if rate < SLOW and full.short:
        changes = ", ".join(full.short)
        say(f"This machine reaches only {rate / 1e9:.0f} GFLOP/s: short version with fewer steps ({changes}).")
        return short
    minutes = ", ".join(f"{stage} {minutes:g}" for stage, minutes in full.minutes.items())
    say(f"This machine reaches {rate / 1e9:.0f} GFLOP/s: full recipe. Minutes on two such cores: {minutes}.")
    return full


def _splits(out: Path, people: list[Person], recipe: Recipe) -> Splits:
    sizes = recipe.people.model_dump()
    splits = draw(people, recipe.run.seed, **sizes, min_items=recipe.evaluation.shots + recipe.evaluation.queries)
    splits.save(out / "splits.json")
    return splits


def _three(found: Study) -> list[int]:
    """Return three people: those with the lowest, the middle, and the highest mean rating in their shots."""
    task, people = found.panel.bank.task, found.panel.people
    order = list(range(len(people)))
    if task.metric == "mae":
        order.sort(key=lambda i: sum(float(task.target(item)) for item in people[i].items) / len(people[i].items))
    return sorted({order[0], order[len(order) // 2], order[-1]}, key=order.index)
