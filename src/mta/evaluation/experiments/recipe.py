"""Recipes of experiments: who takes part, how everything is trained, and which methods each exhibit compares."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mta.config import Run
from mta.config.loader import Settings, checked, merged_over, read_yaml
from mta.data.history import Person
from mta.data.readers.sharing import Copies
from mta.data.splits import Splits, draw
from mta.data.tasks.task import Task
from mta.errors import ConfigError, InputError
from mta.evaluation.methods import AnyMethod
from mta.evaluation.protocol import Ask, able, shots_and_queries

log = logging.getLogger("mta")
FOLDER = "recipes/evaluation"
Which = Literal["test", "development"]
QUALIFIED = {"test": 0.35, "development": 0.1, "candidates": 0.35}  # at most this share of those who qualify


class Sizes(Settings):
    """The most people of each part; a small set gives at most a share of those who have enough items."""

    test: int = Field(100, ge=1)
    development: int = Field(40, ge=0)
    candidates: int = Field(200, ge=4)
    task: int = Field(400, ge=0)
    together: bool = Field(True, description="people who share items are in one part")


class Part(Settings):
    """Methods on one bank, which needs a name of its own where ``words`` or ``retrieve`` change how it is trained."""

    methods: tuple[AnyMethod, ...]
    shots: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    bank: str = "main"
    words: tuple[str, ...] = Field((), description="over the run that builds the bank")
    retrieve: int = Field(0, ge=0, description="earlier items in every prompt, nearest by BM25; in training too")
    whom: Which = "test"
    people: int | None = None  # only the first so many, instead of the experiment's ``compared``
    texts: bool = True  # free text is written out; else only the likelihood of the true text is told


class Experiment(Settings):
    """Everything that is compared on one set of people. Exhibits share banks, splits and scores."""

    about: str = ""
    data: str | None = None
    people: Sizes = Sizes()
    ask: Ask = "last"
    shots: int = 8
    queries: int = 4
    seeds: tuple[int, ...] = (0,)
    compared: int | None = Field(None, description="only the first so many of the people who are tested")
    few: int = Field(30, description="fewer people than this are not compared: a number of shots is left out")
    run: Run
    tuned: dict[str, dict[str, Any]] = Field({}, description="settings over methods of these names, wherever listed")
    exhibits: dict[str, tuple[Part, ...]]

    @model_validator(mode="before")
    @classmethod
    def _tune(cls, values: Any) -> Any:
        tuned, exhibits = values.get("tuned", {}), values.get("exhibits", {})
        if not isinstance(exhibits, dict) or not all(isinstance(parts, list | tuple) for parts in exhibits.values()):
            raise ValueError("exhibits are lists of parts: a name, then below it '- methods: [...]'")
        for part in (part for parts in exhibits.values() for part in parts if isinstance(part, dict)):
            part["methods"] = [
                merged_over(one, tuned.get(one.get("name"), {})) if isinstance(one, dict) else one
                for one in part.get("methods", ())
            ]
        return values

    @field_validator("exhibits")
    @classmethod
    def _rows_have_names_of_their_own(cls, exhibits: dict[str, tuple[Part, ...]]) -> dict[str, tuple[Part, ...]]:
        for exhibit, parts in exhibits.items():
            names = [(part.bank, method.name) for part in parts for method in part.methods]
            if twice := [row for row in names if names.count(row) > 1]:
                raise ValueError(f"exhibit {exhibit!r} has two methods called {twice[0][1]!r}; give each a name")
        return exhibits


def names() -> tuple[str, ...]:
    """The experiments of the package."""
    folder = resources.files("mta") / FOLDER
    every = (file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    return tuple(sorted(name for name in every if not name.startswith("_")))


def load_experiment(name: str | Path) -> Experiment:
    """An experiment by name or by the path of a YAML file. Raises ConfigError."""
    return checked(Experiment, _values(str(name)), f"recipe {name}")


def _values(name: str, folder: Path = Path()) -> dict[str, Any]:
    """A recipe's settings over those of the one it names under ``over``; a file's name is read from its ``folder``."""
    packaged = Path(str(resources.files("mta"))) / FOLDER / f"{name}.yaml"
    path = folder / name if name.endswith((".yaml", ".yml")) else packaged
    if not path.is_file():
        known = ", ".join(names())
        raise ConfigError(f"no recipe {name!r}", hint=f"Give the path of a .yaml, or one of: {known}.")
    values = read_yaml(path)
    below = values.pop("over", None)
    return merged_over(_values(below, path.parent), values) if isinstance(below, str) else values


def drawn(recipe: Experiment, task: Task, people: list[Person]) -> tuple[Splits, dict[str, Any]]:
    """Who takes which part, and a table of the sizes.

    Those with enough items for the protocol and for an anchor qualify; test, development and candidates are drawn among
    them, in shares that leave a small set some of each. The rest, and those with too few items for anything else, train
    the task LoRA, except people who share items with another part. Raises InputError if there are too few people.
    """
    least = recipe.run.bank.min_items
    needed = recipe.shots + recipe.queries if task.asks_as_items else recipe.shots
    timeline = [(len(p.items) + (task.asks_as_items and any(map(task.has_target, p.queries))), p) for p in people]
    qualified = [p for length, p in timeline if length >= max(least, needed) and len(p.items) >= least]
    sizes = recipe.people
    parts = {name: min(getattr(sizes, name), int(share * len(qualified))) for name, share in QUALIFIED.items()}
    how = {"together": sizes.together}
    first = draw(qualified, 0, task=0, **parts, **how)
    taken = {*first.test, *first.development, *first.candidates}
    groups = {p.group for p in people if p.id in taken and p.group and sizes.together}
    rest = [p for p in people if p.id not in taken and p.group not in groups]
    pooled = draw(rest, 0, task=min(sizes.task, len(rest)), development=0, test=0, candidates=0, **how)
    splits = Splits(pooled.task, first.development, first.candidates, first.test)
    enough = {m: sum(n >= m + recipe.queries for n, p in timeline if p.id in set(first.test)) for m in (1, 4, 8, 16)}
    return splits, {
        "people": len(people),
        "qualified": len(qualified),
        **{name: len(getattr(splits, name)) for name in ("task", "candidates", "development", "test")},
        "anchors": min(recipe.run.bank.anchors, len(splits.candidates) // 4),
        "queries": recipe.queries,
        "test people with shots": enough,
        **_sharing(recipe, task, people, splits),
    }


def _sharing(recipe: Experiment, task: Task, people: list[Person], splits: Splits) -> dict[str, int]:
    """Where people share items: how many do, in how many groups, and how many test queries training histories hold."""
    shared = [person.group for person in people if person.group]
    if not shared:
        return {}
    test = [p for p in splits.select("test", people) if able(task, p, recipe.shots, recipe.queries, recipe.ask)]
    asked = [q for p in test for q in shots_and_queries(task, p, recipe.shots, recipe.queries, recipe.ask)[1]]
    trained = splits.select("task", people) + splits.select("candidates", people)
    found = Copies(people, task).in_histories(trained, asked)
    if found:
        log.warning("%d of %d test queries stand in the histories of people who are trained on", found, len(asked))
    return {"people who share items": len(shared), "groups": len(set(shared)), "test queries trained on": found}


def wanted(recipe: Experiment, which: Which, exhibits: Sequence[str]) -> list[str]:
    """The exhibits to be run: those named, else all that belong to these people. Raises InputError."""
    if unknown := [name for name in exhibits if name not in recipe.exhibits]:
        raise InputError(
            f"no exhibit {unknown[0]!r}; there are {', '.join(recipe.exhibits)}",
            hint=f"For example:  --exhibit {next(iter(recipe.exhibits))}",
        )
    own = [name for name, parts in recipe.exhibits.items() if all(part.whom == which for part in parts)]
    if other := [name for name in exhibits if name not in own and which == "test"]:
        raise InputError(f"{other[0]!r} is tried on development people alone", hint="Add --on development.")
    return list(exhibits) or own
