"""``mta demo``: run the whole method on public data, from weights to a report, with a recipe that can be copied."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from mta.bank.bank import Bank
from mta.config import CompareSettings, Run, override
from mta.config.constants import ROUNDING_ONLY
from mta.config.loader import Settings, checked, dump_yaml, read_yaml
from mta.data.history import Person
from mta.data.readers import read_people
from mta.data.splits import Splits, draw
from mta.data.tasks.load import load_task
from mta.errors import ConfigError, InputError
from mta.evaluation.compare import ComparisonReport, compare, run_methods
from mta.evaluation.methods import TaskLora
from mta.evaluation.protocol import TestBatch
from mta.evaluation.reports.summary import HISTORY
from mta.evaluation.reports.two_people import two_people
from mta.model.base import BaseModel
from mta.personalize import Personalizer
from mta.personalize.merge import check_merge
from mta.system import assets
from mta.system.atomic import write_text
from mta.system.progress import OnStep
from mta.tools.cost import planned
from mta.tracking.run_folder import RunFolder

_FEWER = "Ask for fewer people (people.test=16), or for fewer items of each: evaluation.shots=4 evaluation.queries=4"
RECIPE = "recipe.yaml"  # the settings that were chosen, in the demo's folder


class PartSizes(Settings):
    """Number of people in each part; the rest are candidates for anchors."""

    task: int
    development: int
    test: int


class DemoRecipe(Settings):
    """A demo in one file: data, people, settings, and ``short``, which replaces some of them for a few minutes.

    ``history`` are the settings of a second bank with earlier items in its prompts, whose pooled model is one more row.
    """

    data: str
    people: PartSizes
    run: Run
    evaluation: CompareSettings
    history: tuple[str, ...] = ()
    short: tuple[str, ...] = ()


def load_demo(name: str | Path) -> DemoRecipe:
    """Return a recipe of the package by name, or any recipe by path. Raises ConfigError."""
    packaged = Path(str(resources.files("mta"))) / "recipes" / f"{name}.yaml"
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else packaged
    if not path.is_file():
        raise ConfigError(f"no recipe {str(name)!r}", hint="Give the path of a .yaml, or: survey, movielens")
    return checked(DemoRecipe, read_yaml(path), f"recipe {name}")


def demo(
    out: Path,
    recipe: DemoRecipe,
    command: str,
    words: Sequence[str] = (),
    *,
    full: bool = False,
    on_step: OnStep = lambda stage, step: None,
    say: Callable[[str], None] = lambda _: None,
) -> ComparisonReport:
    """Build a bank, evaluate, personalize, and write a report under ``out``; a stopped demo resumes.

    ``words`` are settings that override the recipe and its short version; ``full`` takes the recipe as it is.
    Raises ConfigError if ``out`` holds a demo with other settings.
    """
    recipe = override(recipe, [*(() if full else recipe.short), *words])
    _check_same(out, recipe)
    run = recipe.run
    say(f"1/4  assets: {run.base}, {run.encoder}, {recipe.data}")
    for name in (run.base, run.encoder, recipe.data):
        if name in assets.ASSETS:
            assets.fetch(name, say)
    people, splits = people_of(recipe)
    base = BaseModel.of(run)
    with RunFolder(
        folder=out,
        kind="demo",
        base=base,
        settings=recipe.model_dump(mode="json"),
        config=False,
        command=command,
        on_step=on_step,
        about={"seeds": [run.seed]},
    ) as folder:
        check_merge(planned(run).merge, run.bank.anchors, load_task(run.task).labelled, run.calibration.enabled)
        folder.begin()  # locks the folder
        report = _compared(out, recipe, people, splits, base, folder.step, say)
        report.people = two_people(report.batch, report.comparison)
        say("4/4  a file for each of two people")
        personal = Personalizer(base, report.batch.bank, out / "people", run=run)
        personal.personalize([report.batch.people[one.place] for one in report.people], on_step=folder.step)
        folder.outcome = report.outcome()
        report.write(out, command)
    return report


def people_of(recipe: DemoRecipe) -> tuple[list[Person], Splits]:
    """Return the people of a demo and their parts. Raises InputError if they are too few."""
    people, evaluation = read_people(assets.resolve(recipe.data), recipe.run.task), recipe.evaluation
    try:
        sizes, items = recipe.people.model_dump(), evaluation.shots + evaluation.queries
        return people, draw(people, recipe.run.seed, **sizes, min_items=items)
    except InputError as error:
        raise InputError(error.message, hint=_FEWER) from None


def next_commands(out: Path, report: ComparisonReport) -> list[str]:
    """Return commands to go on with, each below a line that says what it does."""
    bank, store, page = (shlex.quote(str(out / name)) for name in ("bank", "people", "report.html"))
    lines = ["Compare a person's model with the others, at http://127.0.0.1:8000:"]
    lines += [f"  mta serve --bank {bank} --store {store} --insecure-local"]
    lines += [f"Open {page} in a browser (pictures, every number):"]
    lines += [f"  {'open' if sys.platform == 'darwin' else 'xdg-open'} {page}"]
    if report.people:
        person = shlex.quote(report.people[0].id)
        lines += ["Show all that is stored about a person:"]
        lines += [f"  mta person show {person} --bank {bank} --store {store}"]
    return lines


def _compared(
    out: Path,
    recipe: DemoRecipe,
    people: list[Person],
    splits: Splits,
    base: BaseModel,
    on_step: OnStep,
    say: Callable[[str], None],
) -> ComparisonReport:
    """Build the bank, and compare the methods on people outside the bank."""
    run = recipe.run
    pooled = len(splits.task) + (len(splits.candidates) if run.task_lora.kept_back else 0)
    parts = f"task LoRA on {pooled} people, {run.bank.anchors} anchors of {len(splits.candidates)} candidates"
    say(f"2/4  bank: {parts}")
    task_people, candidates = splits.select("task", people), splits.select("candidates", people)

    def built(name: str, run: Run) -> Bank:
        return Bank.build(
            base, candidates, out / name, task=run.task, run=run, task_people=task_people, on_step=on_step
        )

    bank = built("bank", run)
    splits.save(out / "splits.json")  # only now: a mistake must not fix the folder's splits and settings
    write_text(out / RECIPE, dump_yaml(recipe))
    shown = None
    if recipe.history:  # before the comparison: a mistake in these settings must not cost it
        say(f"     {HISTORY}: a second pooled model")
        shown = built("history", override(run, recipe.history))

    say(f"3/4  {len(splits.test)} people outside the bank, {recipe.evaluation.shots} shots each, every method")
    tested = splits.select("test", people)
    report = compare(
        base, bank, tested, recipe.evaluation, run=run, on_step=on_step, on_method=lambda m: say(f"     {m}")
    )
    if shown:
        _add_history(report, shown, tested, recipe.evaluation)
    report.meta["data"] = recipe.data
    if recipe.data in assets.ASSETS:
        report.meta["terms"] = assets.ASSETS[recipe.data].note
    return report


def _add_history(report: ComparisonReport, bank: Bank, tested: Sequence[Person], evaluation: CompareSettings) -> None:
    """Add the pooled model of a bank with history to the comparison, asked the same questions."""
    context = replace(report.batch.context, bank=bank, run=bank.info.run)
    known = {person.id: person for person in tested}
    same = [known[person.id] for person in report.batch.people]
    batch = TestBatch.of(context, same, shots=evaluation.shots, queries=evaluation.queries)
    report.comparison.rows[-1:-1] = run_methods(batch, [TaskLora(name=HISTORY)]).rows


def _check_same(out: Path, chosen: DemoRecipe) -> None:
    """Raise ConfigError if the folder holds a demo with other settings than the chosen ones."""
    path, unused = out / RECIPE, {"run": set(ROUNDING_ONLY)}
    if path.is_file() and load_demo(path).model_dump(exclude=unused) != chosen.model_dump(exclude=unused):
        raise ConfigError(f"{out} holds a demo with other settings ({path})", hint="Choose another folder with --out.")
