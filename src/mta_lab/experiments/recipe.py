"""Recipes of experiments: sizes of the parts, training settings, and the methods that each exhibit compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mta.config import Run, override
from mta.config.constants import ROUNDING_ONLY
from mta.config.loader import Settings, checked, merged_over, read_yaml
from mta.config.schema import Seed
from mta.data.shots_and_queries import QueryOrder
from mta.errors import ConfigError, InputError
from mta.evaluation.methods import Method
from mta_lab.methods.named import AnyMethod, method_class

FOLDER = Path(str(resources.files("mta_lab"))) / "recipes"
Which = Literal["test", "development"]
MAIN_BANK = "main"


def bank_name(bank: str, seed: int) -> str:
    """Return the name of a bank for a seed: in its folder, and in banks.json."""
    return f"{bank}-{seed}"


FREE = ("merge.", "merge=", "stack.", "stack=", "memory=")  # settings that do not change how a bank is trained
# Settings of the whole experiment.
FIXED = ("base", "dtype", "quantize", "device", "task=", "task.", "max_tokens", "seed")


class Sizes(Settings):
    """Maximum number of people in each part; a small data set gives a share of the people with enough items."""

    test: int = Field(100, ge=1, description="tested people")
    development: int = Field(40, ge=0, description="development people")
    candidates: int = Field(200, ge=4, description="candidates")
    task: int = Field(400, ge=0, description="task people")
    together: bool = Field(True, description="people who share items are in one part")
    never_tested: int = Field(0, ge=0, description="number of people on whom choices were made, the first by hash")


class Part(Settings):
    """Methods on one bank. The bank needs a name if ``words``, ``retrieve``, or ``pool`` change it."""

    methods: tuple[AnyMethod, ...]
    shots: tuple[Annotated[int, Field(ge=1)], ...] = ()
    seeds: tuple[Seed, ...] = ()
    bank: str = MAIN_BANK
    words: tuple[str, ...] = Field((), description="settings that override the run of the bank")
    retrieve: int = Field(0, ge=0, description="earlier items in every prompt, nearest by BM25, also in training")
    pool: Literal["task", "everything", "as-many"] = Field(
        "task",
        description="of the task LoRA; everything: all people behind the main bank; as-many: on as many examples as it",
    )
    whom: Which = "test"
    people: int | None = Field(None, ge=1)  # only the first people, this many, whatever ``compared`` is
    texts: bool = True  # generate free text; otherwise only the likelihood of the true text is computed

    @property
    def bank_settings(self) -> tuple[Any, ...]:
        """The part's settings of its bank: words, items in prompts, and the pool it is trained on."""
        words = tuple(word for word in self.words if not word.startswith(FREE))
        return words, self.retrieve, self.pool

    @model_validator(mode="after")
    def _check_bank(self) -> Self:
        if fixed := [word for word in self.words if word.startswith(FIXED)]:
            raise ValueError(f"words: {fixed[0]!r} would change the base or its prompts; make another recipe for it")
        if self.bank == MAIN_BANK and self.bank_settings != ((), 0, "task"):
            raise ValueError("words, retrieve, or pool change how a bank is trained: give it a name with bank:")
        return self


class Experiment(Settings):
    """All comparisons on one set of people. Exhibits (tables and figures) share banks, splits, and scores."""

    about: str = Field("", description="one line about the data and the task")
    data: str | None = Field(None, description="people, as for --data; null: --data is required")
    needs_test: bool = Field(False, description="the tested people come from another file (--test)")
    people: Sizes = Sizes()
    ask: QueryOrder = Field("last", description="queries: a person's last items, or those after the shots (next)")
    shots: int = Field(8, ge=1, description="items that a person's model learns from")
    queries: int = Field(4, ge=1, description="items to predict per person")
    seeds: tuple[Seed, ...] = Field((0,), min_length=1, description="each seed has its own clusters, bank, and stacks")
    compared: int | None = Field(None, ge=1, description="test only this many people (the first); null: all")
    primary: tuple[str, ...] = Field((), description="methods for MTA's primary comparisons (corrected p-values)")
    few: int = Field(30, ge=1, description="a number of shots is left out if fewer people have enough items")
    run: Run
    tuned: dict[str, dict[str, Any]] = Field({}, description="settings by method name, for all exhibits")
    exhibits: dict[str, tuple[Part, ...]] = Field(description="tables and figures; each is a list of parts (methods)")

    def seeds_of(self, part: Part) -> tuple[int, ...]:
        """Return the seeds that a part runs with: its own among these, else the first; without own seeds all."""
        return tuple(seed for seed in self.seeds if seed in part.seeds) or self.seeds[: 1 if part.seeds else None]

    @model_validator(mode="before")
    @classmethod
    def _tune(cls, values: Any) -> Any:
        tuned, exhibits = values.get("tuned") or {}, values.get("exhibits", {})
        if not isinstance(tuned, dict) or not all(isinstance(one, dict) for one in tuned.values()):
            raise ValueError("tuned names methods, and below each its settings")
        if not isinstance(exhibits, dict) or not all(isinstance(parts, list | tuple) for parts in exhibits.values()):
            raise ValueError("exhibits are lists of parts: a name, then below it '- methods: [...]'")

        def with_tuned(part: Any) -> Any:
            if not isinstance(part, dict):
                return part
            methods = part.get("methods", ())
            if not isinstance(methods, list | tuple):
                raise ValueError("methods is a list, such as [base, task-lora]")
            return part | {"methods": [_tuned(method, tuned) for method in methods]}

        if not exhibits:
            raise ValueError("exhibits are missing: a name for each, then below it '- methods: [...]'")
        return values | {"tuned": tuned, "exhibits": {name: list(map(with_tuned, exhibits[name])) for name in exhibits}}

    @field_validator("exhibits")
    @classmethod
    def _check_exhibits(cls, exhibits: dict[str, tuple[Part, ...]]) -> dict[str, tuple[Part, ...]]:
        trained: dict[str, tuple[Any, ...]] = {}
        for exhibit, parts in exhibits.items():
            names = [(part.bank, method.name) for part in parts for method in part.methods]
            if twice := [row for row in names if names.count(row) > 1]:
                raise ValueError(f"exhibit {exhibit!r} has two methods called {twice[0][1]!r}; give each a name")
            for part in parts:
                if trained.setdefault(part.bank, part.bank_settings) != part.bank_settings:
                    raise ValueError(f"two parts train bank {part.bank!r} differently; give one of them another name")
        return exhibits

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        record_names(self)
        return self


def _tuned(method: Any, tuned: Mapping[str, Any]) -> Any:
    """Return a method of a recipe, and the methods within it, with the settings that are tuned for their names."""
    values = {"method": method} if isinstance(method, str) else method
    kind = method_class(str(values.get("method"))) if isinstance(values, dict) else None
    if kind is None:
        return method  # an error that the check of the methods reports

    def default(name: str) -> Any:
        return kind.model_fields[name].get_default() if name in kind.model_fields else None

    settings = merged_over(values, tuned.get(str(values.get("name", default("name"))), {}))
    if over := settings.get("over", default("over")):
        settings["over"] = _tuned(_as_values(over), tuned)
    if isinstance(candidates := settings.get("candidates", default("candidates")), list | tuple):
        settings["candidates"] = [_tuned(_as_values(one), tuned) for one in candidates]
    return settings


def _as_values(method: Any) -> Any:
    """Return a method as it stands in a recipe."""
    return method.model_dump(mode="json") if isinstance(method, Method) else method


def record_names(recipe: Experiment) -> dict[tuple[str, str], tuple[str, str]]:
    """Return (bank, digest of a method) -> (class, name) by which records know the method.

    The name is that of the first method with these settings on this bank: exhibits share its results. Raises
    ValueError if two methods of one class with other settings have the same name on a bank.
    """
    names: dict[tuple[str, str], tuple[str, str]] = {}
    digests: dict[tuple[str, str, str], str] = {}
    for part in (part for parts in recipe.exhibits.values() for part in parts):
        for method in part.methods:
            digest, kind = method.digest, method.method
            if digests.setdefault((part.bank, kind, method.name), digest) != digest:
                raise ValueError(
                    f"two methods called {method.name!r} on bank {part.bank!r} have other settings; "
                    "give one of them another name"
                )
            names.setdefault((part.bank, digest), (kind, method.name))
    return names


def names() -> tuple[str, ...]:
    """Return the names of the packaged experiments."""
    return tuple(sorted(file.stem for file in FOLDER.glob("[!_]*.yaml")))


def load_experiment(name: str | Path) -> Experiment:
    """Return an experiment by name or by the path of a YAML file. Raises ConfigError."""
    return checked(Experiment, _values(str(name)), f"recipe {name}")


def _values(name: str, folder: Path = Path(), above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a recipe's settings merged over those of its ``over`` recipe; file names are relative to ``folder``."""
    path = folder / name if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        hint = f"Give the path of a .yaml, or one of: {', '.join(names())}. For a file of people:  mta compare"
        raise ConfigError(f"no recipe {name!r}", hint=hint)
    if path.resolve() in above:
        raise ConfigError(f"recipe {above[0].name} is over itself", hint="Remove one of the lines  over: …")
    values = read_yaml(path)
    below, above = values.pop("over", None), (*above, path.resolve())
    if below is None:
        return values
    if not isinstance(below, str):
        raise ConfigError(f"{path}: over is {below!r}, expected one recipe", hint="Write a line such as  over: lamp3")
    return merged_over(_values(below, path.parent, above), values)


def difference(before: Experiment, now: Experiment) -> tuple[str, Any, Any] | None:
    """Return the first setting in which two recipes differ, and its two values; None if their results are alike.

    Recipes may differ in what and how much is run (exhibits, methods, seeds, numbers of tested people), and in settings
    that change rounding only. A bank or a method that both have must be the same.
    """
    (one, parts), (other, others) = map(_settings, (before, now))
    one, other = one | {key: parts[key] for key in parts if key in others}, other | others
    keys = [key for key in one if key not in _HOW_MUCH and one[key] != other.get(key)]
    return (keys[0], one[keys[0]], other.get(keys[0])) if keys else None


_HOW_MUCH = {"about", "seeds", "compared", *(f"run.{name}" for name in ROUNDING_ONLY)}


def _settings(recipe: Experiment) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a recipe's settings by key, and those of its banks and of the methods on them."""
    parts = [part for parts in recipe.exhibits.values() for part in parts]
    named: dict[str, Any] = {f"bank {part.bank}": part.bank_settings for part in parts}
    for part in parts:
        free = [word for word in part.words if word.startswith(FREE)]
        named |= {f"{one.method} {one.name!r} on bank {part.bank}": (one.digest, free) for one in part.methods}
    return dict(_flat(recipe.model_dump(mode="json", exclude={"exhibits"}))), named


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of all groups, with keys such as ``run.base``."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value


def _check_words(recipe: Experiment) -> None:
    """Raise InputError if two parts run one method with different merges or stacks: a report would mix the results.

    Raises ConfigError for a wrong word.
    """
    known: dict[tuple[str, str], object] = {}
    for part in (part for parts in recipe.exhibits.values() for part in parts):
        try:
            run = override(recipe.run, part.words)
        except ConfigError as error:
            raise ConfigError(f"words of bank {part.bank!r}: {error.message}", hint=error.hint) from None
        for method in part.methods:
            settings = run.merge, run.stack
            if method.uses_bank and known.setdefault((part.bank, method.digest), settings) != settings:
                raise InputError(
                    f"two parts run {method.name!r} on bank {part.bank!r} with different words",
                    hint="Give the method its own merge and stack instead.",
                )


def wanted(recipe: Experiment, which: Which, exhibits: Sequence[str]) -> list[str]:
    """Return the exhibits to run: the named ones, or all exhibits for these people. Raises InputError."""
    if unknown := [name for name in exhibits if name not in recipe.exhibits]:
        raise InputError(
            f"no exhibit {unknown[0]!r}; there are {', '.join(recipe.exhibits)}",
            hint=f"For example:  --exhibit {next(iter(recipe.exhibits))}",
        )
    _check_words(recipe)
    own = [
        name
        for name, parts in recipe.exhibits.items()
        if all(part.whom == which for part in parts) and (parts or which == "test")  # without parts: about the banks
    ]
    if other := [name for name in exhibits if name not in own and which == "test"]:
        raise InputError(f"exhibit {other[0]!r} is for development people only", hint="Add --on development.")
    return list(exhibits) or own
