"""The demo's comparison on more people than fit into its minutes, for narrower intervals (docs/explanation/results.md).

Run:  python -m benchmarks.many_people --out many [people.test=300] [key=value over the recipe]
About an hour on two cores. The development people settings were chosen on (docs/explanation/tuning.md) take no part.
Differences are also written for the *unseen* people: in no development part of a recipe, and not tested by the demo.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mta.bank.bank import Bank
from mta.cli.screen import Screen, console
from mta.config import Training, override
from mta.data.history import Person
from mta.data.readers import read_people
from mta.data.splits import Splits, draw
from mta.evaluation.compare import Study, study
from mta.evaluation.experiments.recipe import load_experiment
from mta.evaluation.methods import OneLora, OtherPerson, PopulationMerge
from mta.evaluation.reports.tables import show
from mta.evaluation.statistics import bootstrap
from mta.model.base import BaseModel
from mta.system import assets
from mta.system.atomic import write_json
from mta.system.device import processor
from mta.system.malloc import keep_freed_memory
from mta.system.provenance import commit
from mta.tools.demo import Recipe, load_recipe

RECIPE = (
    "people.test=300",
    "people.task=200",
    'evaluation.policies=["similarity","loss","posterior","ridge","learned"]',
)
CONTROLS = (  # what another step size, one merge for everybody, and another person's shots gain
    OneLora(name="OPPU, one step", training=Training(lr=3.2e-3, steps=1, batch_size=64, prior=8)),
    PopulationMerge(),
    OtherPerson(),
)
TUNED = {"test": 60, "development": 100}  # the parts docs/explanation/tuning.md was made with


def untouched(recipe: Recipe, people: list[Person]) -> Splits:
    """Parts drawn from everybody no setting was chosen on."""
    how = {"min_items": recipe.evaluation.shots + recipe.evaluation.queries}
    development = set(draw(people, recipe.run.seed, task=0, **TUNED, **how).development)
    rest = [person for person in people if person.id not in development]
    return draw(rest, recipe.run.seed, task=recipe.people.task, development=0, test=recipe.people.test, **how)


def seen(recipe: Recipe, people: list[Person]) -> set[str]:
    """People of other recipes' development parts, and those the demo tests: decisions may have followed from them."""
    min_items = recipe.evaluation.shots + recipe.evaluation.queries
    demo, paper = load_recipe("movielens").people, load_experiment("movielens").people
    sizes = {"task": demo.task, "development": demo.development, "test": demo.test}
    shown = draw(people, recipe.run.seed, **sizes, min_items=min_items)
    sizes = {"task": 0, "development": paper.development, "test": paper.test}
    chosen = draw(people, recipe.run.seed, **sizes, min_items=min_items)
    return {*shown.test, *shown.development, *chosen.development}


def among(found: Study, unseen: list[bool]) -> dict[str, Any]:
    """NLL of MTA minus each other method's, over the unseen people only."""
    comparison = found.comparison
    kept, ours = torch.tensor(unseen), comparison.row("MTA").people["NLL"]
    differences = {
        row.name: asdict(bootstrap((ours - row.people["NLL"])[..., kept]))
        for row in comparison.rows
        if row.name != "MTA"
    }
    return {"people": sum(unseen), "NLL of MTA minus": differences}


def run(recipe: Recipe, out: Path, screen: Screen) -> Study:
    """Bank and comparison under ``out``; a bank that is there is used again."""
    people = read_people(assets.resolve(recipe.data), recipe.run.task)
    parts = untouched(recipe, people)
    base = BaseModel.of(recipe.run)
    candidates, task_people = parts.select("candidates", people), parts.select("task", people)
    how = {"task": recipe.run.task, "run": recipe.run, "task_people": task_people, "on_step": screen.step}
    bank = Bank.build(base, candidates, out / "bank", **how)
    tested = parts.select("test", people)
    shown = {"on_step": screen.step, "on_method": screen.say}
    found = study(base, bank, recipe.run, tested, recipe.evaluation, more=CONTROLS, **shown)
    known = seen(recipe, people)
    unseen = [person.id not in known for person in found.panel.people]
    found.meta["unseen"] = among(found, unseen)
    scores = {row.name: row.people["NLL"].flatten().tolist() for row in found.comparison.rows}
    write_json(out / "people.json", {"unseen": unseen, "NLL": scores})
    return found


def main() -> None:
    """Write report.html and results.json under --out, and show the table."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--out", type=Path, default=Path("many"))
    words.add_argument("settings", nargs="*", help="key=value over the recipe")
    given = words.parse_args()
    with Screen() as screen:
        found = run(override(load_recipe("movielens"), [*RECIPE, *given.settings]), given.out, screen)
    where = {"processor": processor(), "commit": commit(Path(__file__).parent)}
    found.meta |= {**where, "data": "movielens-100k", "terms": assets.ASSETS["movielens-100k"].note}
    found.write(given.out, " ".join(["python -m benchmarks.many_people", *given.settings]))
    show(found.comparison, found.meta, console)


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    main()
