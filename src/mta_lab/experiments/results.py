"""Results of an experiment on disk: appended during the run, and read as comparisons, without a model."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from pydantic import BaseModel

from mta.config.loader import checked
from mta.data.tasks.load import load_task
from mta.data.tasks.task import Task
from mta.errors import DataError
from mta.evaluation.methods import Method
from mta.evaluation.metrics import PersonScore
from mta.evaluation.statistics import Comparison, Row
from mta.system.atomic import append_lines, make_folder, replacing
from mta.tracking.run_folder import sittings
from mta_lab.experiments.recipe import MAIN_BANK, Experiment, record_names

KIND = "experiment"  # of its sittings in run.json
SCORES, RECIPE, SIZES, FACTS = "scores.jsonl", "recipe.yaml", "sizes.json", "banks.json"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times as fast
_COPY = "Restore it from a copy."
META = "meta.json"  # facts of the runs behind published scores, and of versions without run.json


class Where(NamedTuple):
    """What a record is about, apart from the person: a method by ``record_names``, the bank, the shots, the seed.

    The folder's recipe says the rest. The seed is 0 if it does not affect the result.
    """

    kind: str
    method: str
    bank: str
    shots: int
    seed: int


class Record(BaseModel, frozen=True, extra="forbid"):
    """One method on one person with one seed.

    ``kind`` is the method's class and ``method`` its name (``record_names``). ``person`` and ``group`` (people who
    share items) are salted hashes. ``nll`` is the NLL of each query's gold answer, None without probabilities.
    ``seconds`` is this person's share of the preparation.
    ``ids``, ``answers`` and ``golds`` are texts of people, and the log probabilities of all labels (``labels`` of the
    queries, ``shot_labels``) tell answers: these stay in this folder and are never published.
    """

    kind: str
    method: str
    bank: str
    seed: int
    shots: int
    person: str
    group: str = ""
    metrics: dict[str, float]
    nll: tuple[float, ...] | None
    seconds: float
    bytes: float
    anchors: tuple[int, ...] = ()
    w: tuple[float, ...] = ()
    chosen: str = ""
    ids: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    golds: tuple[str, ...] = ()
    labels: tuple[tuple[float, ...], ...] = ()
    shot_labels: tuple[tuple[float, ...], ...] = ()
    prompt_tokens: float = 0.0

    @property
    def where(self) -> Where:
        """What the record is about, apart from the person."""
        return Where(self.kind, self.method, self.bank, self.shots, self.seed)

    @property
    def full(self) -> bool:
        """Whether more than likelihoods was measured: free text is only generated for some exhibits."""
        return any(name != "NLL" for name in self.metrics)

    @property
    def score(self) -> PersonScore:
        """The metrics, and the NLL of the queries as a tensor."""
        return PersonScore(self.metrics, None if self.nll is None else torch.tensor(self.nll, dtype=torch.float64))


class Records:
    """The records of one folder; existing records are not computed again.

    An incomplete line of a killed run is dropped, and its result is computed again.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / SCORES
        self.rows = list(_read(self.path)) if self.path.exists() else []
        self._known = {(row.where, row.person): row for row in latest(self.rows)}

    def lacks(self, where: Where, people: Sequence[str], full: bool = False) -> bool:
        """Return whether a person's result is missing, or with ``full`` holds only likelihoods."""
        records = [self._known.get((where, person)) for person in people]
        return any(one is None or (full and not one.full) for one in records)

    def add(self, rows: Iterable[Record]) -> None:
        """Append new results; existing results do not change, except that full ones replace likelihoods."""
        new = [row for row in rows if self.lacks(row.where, [row.person], full=row.full)]
        make_folder(self.path.parent)
        append_lines(self.path, [row.model_dump_json(exclude_defaults=True) for row in new])
        self.rows += new
        self._known |= {(row.where, row.person): row for row in new}


def read_records(folder: Path) -> list[Record]:
    """Return all records of a folder, published or not. Raises DataError without a file or for a wrong line."""
    for path in (folder / SCORES, folder / f"{SCORES}.gz"):
        if path.exists():
            return list(_read(path))
    raise DataError(f"{folder} holds no {SCORES}", hint="Give --out of mta-lab evaluate, or one of results/.")


def write_without_texts(records: Sequence[Record], path: Path) -> None:
    """Write the records, compressed and without texts of people; the same records give the same bytes."""
    private = {"ids", "answers", "golds", "labels", "shot_labels"}
    lines = sorted(row.model_dump_json(exclude=private, exclude_defaults=True) for row in latest(records))
    with replacing(path) as temporary:
        temporary.write(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))


def latest(records: Iterable[Record]) -> list[Record]:
    """Return one record for each person and method: the first, or the first with more than likelihoods."""
    kept: dict[tuple[Where, str], Record] = {}
    for one in records:
        if (key := (one.where, one.person)) not in kept or (one.full and not kept[key].full):
            kept[key] = one
    return [*kept.values()]


def read_recipe(folder: Path) -> Experiment:
    """Return the recipe of an experiment's folder. Raises DataError."""
    try:
        values = yaml.load((folder / RECIPE).read_text(encoding="utf-8"), _Loader)  # noqa: S506
        return checked(Experiment, values or {}, RECIPE)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"{folder} is not a folder of an experiment: {error}",
            hint="Give --out of mta-lab evaluate, or one of results/.",
        ) from None


Seeds = dict[int, dict[str, Record]]  # seed -> person -> record


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

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Read a folder. Raises DataError if a file is missing or invalid."""
        above = folder if (folder / RECIPE).exists() else folder.parent  # development/ is inside the folder
        recipe = read_recipe(above)
        meta = {"exhibits": list(recipe.exhibits)} | _meta(folder)
        facts = read_beside(folder / FACTS)
        scored = any(recipe.exhibits.get(name) for name in meta["exhibits"])  # "banks" has no methods
        records = latest(read_records(folder)) if scored or not facts else []
        beside = read_beside(above / SIZES), meta, facts
        return cls(folder, recipe, load_task(recipe.run.task), records, *beside)

    @property
    def name(self) -> str:
        """Name of the data set: its file, or the experiment's folder; or the task and the file of tested people."""
        tested = self.sizes.get("tested")
        return f"{self.task.name}-{Path(tested).stem}" if tested else str(self.sizes.get("data", self.folder.name))

    @cached_property
    def _names(self) -> dict[tuple[str, str], tuple[str, str]]:
        return record_names(self.recipe)

    @cached_property
    def _rows(self) -> dict[tuple[str, str, str, int], Seeds]:
        """(class, name, bank, shots) -> seed -> person -> record."""
        rows: dict[tuple[str, str, str, int], Seeds] = {}
        for one in self.records:
            rows.setdefault(one.where[:4], {}).setdefault(one.seed, {})[one.person] = one
        return rows

    def _seeds_of(self, method: Method, bank: str, shots: int | None = None) -> Seeds:
        """Return the results of one method on a bank; empty if there are none."""
        return self._rows.get((*self._names[bank, method.digest], bank, shots or self.recipe.shots), {})

    def comparison(
        self, name: str, shots: int | None = None, seeds: Collection[int] | None = None, among: Collection[str] = ()
    ) -> Comparison | None:
        """Return an exhibit's methods over the people and seeds that all methods have; None without results.

        The seeds are all that were run, or only ``seeds``. Methods that do not use the bank have one result for each
        person, of whichever seed was run first. With ``among``, only methods with these names count.
        """
        common = {seed for seed in self.seeds(name, shots, among) if seeds is None or seed in seeds}
        rows = [
            (one.name, bank, [by_seed[s] for s in sorted(by_seed) if s in common or not one.uses_bank])
            for one, bank, by_seed in self._methods(name, shots, among)
        ]
        if not rows or not all(by_seed for _, _, by_seed in rows):
            return None  # no seed that all methods have
        people = sorted(set.intersection(*(set(records) for _, _, by_seed in rows for records in by_seed)))
        if not people:
            return None
        methods = [method for method, _, _ in rows]
        titles = [m if methods.count(m) == 1 or bank == MAIN_BANK else f"{m} ({bank})" for m, bank, _ in rows]
        averaged = [
            _row(title, [[s[p] for p in people] for s in by_seed]) for title, (_, _, by_seed) in zip(titles, rows)
        ]
        first = rows[0][2][0]
        return Comparison(self.task, averaged, tuple(first[person].group for person in people))

    def seeds(self, name: str, shots: int | None = None, among: Collection[str] = ()) -> list[int]:
        """Return the seeds that every method of an exhibit, or every one ``among`` them, was run with.

        A seed with less than half of the people of another one, or of those asked for, was interrupted: it is left out.
        """
        methods = [seeds for method, _, seeds in self._methods(name, shots, among) if method.uses_bank]
        common = set.intersection(*map(set, methods)) if methods else set()
        people = {seed: len(set.intersection(*(set(seeds[seed]) for seeds in methods))) for seed in common}
        most = min(max(people.values(), default=0), self.recipe.compared or math.inf)
        return sorted(seed for seed in common if 2 * people[seed] >= most)

    def of(self, method: Method, seed: int) -> list[Record]:
        """Return the records of one method on the main bank with one seed."""
        return list(self._seeds_of(method, MAIN_BANK).get(seed, {}).values())

    def _methods(self, name: str, shots: int | None, among: Collection[str] = ()) -> list[tuple[Method, str, Seeds]]:
        """Return each method of an exhibit that has results, with its bank and its results."""
        every = [(method, part.bank) for part in self.recipe.exhibits.get(name, ()) for method in part.methods]
        pairs = [(method, bank) for method, bank in every if not among or method.name in among]
        rows = [(method, bank, self._seeds_of(method, bank, shots)) for method, bank in pairs]
        return [row for row in rows if row[2]]


def _row(name: str, seeds: Sequence[Sequence[Record]]) -> Row:
    """Return the row of one method; ``seeds`` hold the same people in the same order."""
    records = [record for people in seeds for record in people]
    seconds = sum(record.seconds for record in records) / len(seeds)
    stored = sum(record.bytes for record in records) / len(records)
    asked = sum(record.prompt_tokens for record in records) / len(records)
    return Row.of(name, [[record.score for record in people] for people in seeds], seconds, stored, prompt_tokens=asked)


def _read(path: Path) -> Iterator[Record]:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            lines = file.read().split(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or not readable: {error}", hint=_COPY) from None
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            yield Record.model_validate(json.loads(line.decode()))
        except json.JSONDecodeError:
            continue  # incomplete line of a killed run
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":  # else the kill came within a character
                raise DataError(f"{path} is damaged or not readable: {error}", hint=_COPY) from None
        except ValueError:
            raise DataError(
                f"{path}, line {number}: not a record of an experiment",
                hint="Remove that line and repeat the command: its result is computed again.",
            ) from None


def _meta(folder: Path) -> dict[str, Any]:
    """Return the facts beside the scores: base, precision, which people, and the runs with their times and machines."""
    before = read_beside(folder / META)
    runs = [run for run in sittings(folder) if run["kind"] == KIND]
    if not runs:
        return before
    facts = {name: runs[-1][name] for name in ("base", "note", "dtype", "which")}
    exhibits = {name for run in (before, *runs) for name in run.get("exhibits", ())}
    return facts | {"exhibits": sorted(exhibits), "runs": [*before.get("runs", ()), *runs]}


def read_beside(path: Path) -> dict[str, Any]:
    """Return a file that lies beside the scores; empty if it is missing. Raises DataError if it is not JSON."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} is not readable JSON: {error}",
            hint="Remove the file and repeat  mta-lab evaluate … --out  with that folder: the file is written again.",
        ) from None
