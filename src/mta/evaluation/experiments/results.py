"""Result files back as comparisons: everything a report draws comes from here, nothing is computed by a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from mta.config.loader import checked
from mta.data.tasks.load import load_task
from mta.data.tasks.task import Task
from mta.errors import DataError, InputError
from mta.evaluation.experiments.recipe import Experiment, Part
from mta.evaluation.experiments.records import Record, read_records
from mta.evaluation.experiments.runner import CASE, FACTS
from mta.evaluation.experiments.workspace import RECIPE, SIZES
from mta.evaluation.methods import Method
from mta.evaluation.metrics import Answers
from mta.evaluation.statistics import Comparison, Row
from mta.tracking.run_folder import sittings

BEFORE = "meta.json"  # where experiments told of their runs before run.json


@dataclass(frozen=True)
class Results:
    """One experiment's folder."""

    folder: Path
    recipe: Experiment
    task: Task
    records: list[Record]
    sizes: dict[str, Any]
    meta: dict[str, Any]
    facts: dict[str, Any]
    case: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Raises DataError where a file is missing or is none of ours."""
        above = folder if (folder / RECIPE).exists() else folder.parent  # development/ lies in its experiment's folder
        try:
            recipe = checked(Experiment, yaml.safe_load((above / RECIPE).read_text(encoding="utf-8")), RECIPE)
        except (OSError, yaml.YAMLError) as error:
            raise DataError(
                f"{folder} is no folder of an experiment: {error}",
                hint="Give the --out folder of mta evaluate, or one of results/.",
            ) from None
        sizes, meta, facts, case = (
            _json(above / SIZES),
            {"exhibits": list(recipe.exhibits)} | _meta(folder),
            _json(folder / FACTS),
            _json(folder / CASE),
        )
        records = latest(read_records(folder))
        return cls(folder, recipe, load_task(recipe.run.task), records, sizes, meta, facts, case)

    @property
    def name(self) -> str:
        """What the set is called: where its data lay, or its recipe."""
        return str(self.sizes.get("data", self.folder.name))

    @cached_property
    def _rows(self) -> dict[tuple[str, str, int, int], dict[str, Record]]:
        """(settings, bank, shots, seed) -> person -> record."""
        found: dict[tuple[str, str, int, int], dict[str, Record]] = {}
        for record in self.records:
            found.setdefault((record.settings, record.bank, record.shots, record.seed), {})[record.person] = record
        return found

    def exhibit(self, name: str) -> tuple[Part, ...]:
        """An exhibit's parts. Raises InputError if the recipe has none of that name."""
        if name not in self.recipe.exhibits:
            raise InputError(
                f"no exhibit {name!r} in {self.folder}; there are {', '.join(self.recipe.exhibits)}",
                hint="Name one of them, or add it to the recipe and run it:  mta evaluate",
            )
        return self.recipe.exhibits[name]

    def comparison(self, name: str, shots: int | None = None, seed: int | None = None) -> Comparison | None:
        """An exhibit's methods over the people and seeds that all of them have; None where nothing has been run.

        A person's metrics are averaged over seeds first, or are of the one ``seed`` asked for. What knows nothing of
        the bank has one seed's answers only.
        """
        groups = [
            (method, part.bank, seeds)
            for part in self.exhibit(name)
            for method in part.methods
            if (seeds := self._seeds(method, part.bank, shots))
        ]
        if not groups:
            return None
        shared = [set(seeds) for method, _, seeds in groups if method.of_bank]
        common = set.intersection(*shared) if shared else set()
        if seed is not None:
            common &= {seed}
        rows = [
            ((method.name, bank), [seeds[s] for s in sorted(seeds) if not method.of_bank or s in common])
            for method, bank, seeds in groups
        ]
        if not all(seeds for _, seeds in rows):
            return None  # no seed that all of them were run with
        people = sorted(set.intersection(*(set(records) for _, seeds in rows for records in seeds)))
        if not people:
            return None
        called = _names([key for key, _ in rows])
        made = [_row(name, [[s[p] for p in people] for s in seeds]) for name, (_, seeds) in zip(called, rows)]
        first = rows[0][1][0]
        return Comparison(self.task, made, tuple(first[person].group for person in people))

    def seeds(self, name: str, shots: int | None = None) -> list[int]:
        """The seeds that every method of an exhibit was run with."""
        found = [
            set(self._seeds(method, part.bank, shots))
            for part in self.exhibit(name)
            for method in part.methods
            if method.of_bank
        ]
        return sorted(set.intersection(*(one for one in found if one))) if any(found) else []

    def _seeds(self, method: Method, bank: str, shots: int | None) -> dict[int, dict[str, Record]]:
        key = (method.digest, bank, shots or self.recipe.shots)
        return {seed: people for (*one, seed), people in self._rows.items() if tuple(one) == key}

    def of(self, method: Method, bank: str = "main", shots: int | None = None) -> list[Record]:
        """All records of one method, seed by seed."""
        return [r for people in self._seeds(method, bank, shots).values() for r in people.values()]


def _names(rows: Sequence[tuple[str, str]]) -> list[str]:
    """What rows are called: by their method, and by their bank too where another bank has the same method."""
    methods = [method for method, _ in rows]
    return [m if methods.count(m) == 1 or bank == "main" else f"{m} ({bank})" for m, bank in rows]


def latest(records: Sequence[Record]) -> list[Record]:
    """Where the run's own settings have changed since, or the bank, only what was found with the last ones."""
    keys = {(r.settings, r.bank, r.shots, r.seed): r.key for r in records}
    return [r for r in records if keys[r.settings, r.bank, r.shots, r.seed] == r.key]


def _row(name: str, seeds: Sequence[Sequence[Record]]) -> Row:
    """One method; ``seeds`` hold the same people in the same order."""
    every = [record for people in seeds for record in people]
    metrics = {
        metric: torch.tensor([[r.metrics[metric] for r in people] for people in seeds], dtype=torch.float64).mean(0)
        for metric in every[0].metrics
    }
    told = [[torch.tensor(r.nll, dtype=torch.float64) for r in people if r.nll is not None] for people in seeds]
    nll = [torch.stack(one).mean(0) for one in zip(*told)] if all(len(t) == len(seeds[0]) for t in told) else None
    answers = [Answers([""] * (len(r.nll) if r.nll else 1)) for r in seeds[0]]
    seconds = sum(r.seconds for r in every) / len(seeds)
    return Row(name, metrics, nll, seconds, sum(r.bytes for r in every) / len(every), None, answers)


def _meta(folder: Path) -> dict[str, Any]:
    """What a reader must know beside the scores: base, precision, which people, what was run when and where."""
    before = _json(folder / BEFORE)  # of versions that wrote no run.json
    told = [one for one in sittings(folder) if one["kind"] == "experiment"]
    if not told:
        return before
    facts = {name: told[-1][name] for name in ("base", "note", "dtype", "which")}
    exhibits = {name for one in (before, *told) for name in one.get("exhibits", ())}
    return facts | {"exhibits": sorted(exhibits), "runs": [*before.get("runs", ()), *told]}


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not readable JSON: {error}",
            hint="Remove it, and repeat  mta evaluate … --out  with that folder: it is written again.",
        ) from None
