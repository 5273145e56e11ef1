"""Read result files as comparisons: everything in a report comes from these files, without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mta.config.loader import checked
from mta.data.tasks.load import load_task
from mta.data.tasks.task import Task
from mta.errors import DataError, InputError
from mta.evaluation.experiments.recipe import Experiment, Part
from mta.evaluation.experiments.records import Record, read_records
from mta.evaluation.experiments.runner import CASE, FACTS
from mta.evaluation.experiments.workspace import RECIPE, SIZES
from mta.evaluation.methods import Method
from mta.evaluation.metrics import Answers, PersonScore
from mta.evaluation.statistics import Comparison, Row
from mta.tracking.run_folder import sittings

BEFORE = "meta.json"  # file of the runs in versions without run.json


@dataclass(frozen=True)
class Results:
    """The files of one experiment's folder."""

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
        """Read a folder. Raises DataError if a file is missing or invalid."""
        above = folder if (folder / RECIPE).exists() else folder.parent  # development/ is inside the folder
        try:
            recipe = checked(Experiment, yaml.safe_load((above / RECIPE).read_text(encoding="utf-8")), RECIPE)
        except (OSError, yaml.YAMLError) as error:
            raise DataError(
                f"{folder} is not a folder of an experiment: {error}",
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
        """Name of the data set: its file, or the folder of the experiment."""
        return str(self.sizes.get("data", self.folder.name))

    @cached_property
    def _rows(self) -> dict[tuple[str, str, int, int], dict[str, Record]]:
        """(settings, bank, shots, seed) -> person -> record."""
        found: dict[tuple[str, str, int, int], dict[str, Record]] = {}
        for record in self.records:
            found.setdefault((record.settings, record.bank, record.shots, record.seed), {})[record.person] = record
        return found

    def exhibit(self, name: str) -> tuple[Part, ...]:
        """Return the parts of an exhibit. Raises InputError if the recipe has no such exhibit."""
        if name not in self.recipe.exhibits:
            raise InputError(
                f"no exhibit {name!r} in {self.folder}; there are {', '.join(self.recipe.exhibits)}",
                hint="Name one of them, or add it to the recipe and run it:  mta evaluate",
            )
        return self.recipe.exhibits[name]

    def comparison(self, name: str, shots: int | None = None, seed: int | None = None) -> Comparison | None:
        """Return an exhibit's methods over the people and seeds that all methods have; None without results.

        A person's metrics are averaged over seeds first, or are those of ``seed``. Methods that do not use the bank
        have results of one seed only.
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
            return None  # no seed that all methods have
        people = sorted(set.intersection(*(set(records) for _, seeds in rows for records in seeds)))
        if not people:
            return None
        titles = _names([key for key, _ in rows])
        averaged = [_row(name, [[s[p] for p in people] for s in seeds]) for name, (_, seeds) in zip(titles, rows)]
        first = rows[0][1][0]
        return Comparison(self.task, averaged, tuple(first[person].group for person in people))

    def seeds(self, name: str, shots: int | None = None) -> list[int]:
        """Return the seeds that every method of an exhibit was run with."""
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
        """Return all records of one method, seed by seed."""
        return [r for people in self._seeds(method, bank, shots).values() for r in people.values()]


def _names(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Return the names of rows: the method, with its bank if several banks have the method."""
    methods = [method for method, _ in rows]
    return [m if methods.count(m) == 1 or bank == "main" else f"{m} ({bank})" for m, bank in rows]


def latest(records: Sequence[Record]) -> list[Record]:
    """Return only the records of the last settings and bank, if these were changed between runs."""
    keys = {(r.settings, r.bank, r.shots, r.seed): r.key for r in records}
    return [r for r in records if keys[r.settings, r.bank, r.shots, r.seed] == r.key]


def _row(name: str, seeds: Sequence[Sequence[Record]]) -> Row:
    """Return the row of one method; ``seeds`` hold the same people in the same order."""
    records = [record for people in seeds for record in people]
    scores = [[PersonScore(record.metrics, _tensor(record.nll)) for record in people] for people in seeds]
    answers = [Answers([""] * (len(record.nll) if record.nll else 1)) for record in seeds[0]]
    seconds = sum(record.seconds for record in records) / len(seeds)
    stored = sum(record.bytes for record in records) / len(records)
    return Row.of(name, scores, seconds, stored, None, answers)


def _tensor(nll: Sequence[float] | None) -> Tensor | None:
    return None if nll is None else torch.tensor(nll, dtype=torch.float64)


def _meta(folder: Path) -> dict[str, Any]:
    """Return the facts beside the scores: base, precision, which people, and the runs with their times and machines."""
    before = _json(folder / BEFORE)
    runs = [run for run in sittings(folder) if run["kind"] == "experiment"]
    if not runs:
        return before
    facts = {name: runs[-1][name] for name in ("base", "note", "dtype", "which")}
    exhibits = {name for run in (before, *runs) for name in run.get("exhibits", ())}
    return facts | {"exhibits": sorted(exhibits), "runs": [*before.get("runs", ()), *runs]}


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not readable JSON: {error}",
            hint="Remove the file and repeat  mta evaluate … --out  with that folder: the file is written again.",
        ) from None
