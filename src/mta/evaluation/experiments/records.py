"""Results of an experiment, one JSON line per method, seed and person: appended during the run, read for exhibits."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mta.errors import DataError
from mta.system.atomic import make_folder, owner_only, written_aside

FILE = "scores.jsonl"


class Record(BaseModel):
    """One method on one person with one seed.

    ``key`` is a hash of everything but the person that determines the result. ``person`` and ``group`` (people who
    share items) are salted hashes. ``settings`` is the hash of the method, whatever its name in an exhibit. ``nll`` is
    the NLL of each query's gold answer, None without probabilities. ``seconds`` is this person's share of the
    preparation.
    ``ids``, ``answers`` and ``golds`` are texts of people: they stay in this folder and are never published.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    settings: str
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


class Records:
    """The records of one folder; existing records are not computed again.

    An incomplete line of a killed run is dropped, and its result is computed again.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.rows = list(_read(self.path)) if self.path.exists() else []
        self._known = {(row.key, row.person) for row in self.rows}

    def lacks(self, key: str, people: Sequence[str]) -> bool:
        """Return whether a person's result is missing."""
        return any((key, person) not in self._known for person in people)

    def add(self, rows: Iterable[Record]) -> None:
        """Append new results; existing results do not change."""
        new = [row for row in rows if (row.key, row.person) not in self._known]
        make_folder(self.path.parent)
        torn = self.path.exists() and self.path.stat().st_size > 0 and not self.path.read_bytes().endswith(b"\n")
        with open(self.path, "a", encoding="utf-8", opener=owner_only) as file:
            file.write("\n" * torn + "".join(row.model_dump_json(exclude_defaults=True) + "\n" for row in new))
        self.rows += new
        self._known |= {(row.key, row.person) for row in new}


def read_records(folder: Path) -> list[Record]:
    """Return all records of a folder, published or not. Raises DataError without a file or for a wrong line."""
    for path in (folder / FILE, folder / f"{FILE}.gz"):
        if path.exists():
            return list(_read(path))
    raise DataError(f"{folder} holds no {FILE}", hint="Give the --out folder of mta evaluate, or one of results/.")


def publish(records: Sequence[Record], path: Path) -> None:
    """Write compressed records without texts of people; the same records give the same bytes."""
    private = {"ids", "answers", "golds"}
    lines = sorted(row.model_dump_json(exclude=private, exclude_defaults=True) for row in records)
    with written_aside(path) as aside:
        aside.write(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))


def _read(path: Path) -> Iterator[Record]:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            yield Record.model_validate(json.loads(line))
        except (ValueError, ValidationError) as error:
            if isinstance(error, json.JSONDecodeError):
                continue  # incomplete line of a killed run
            raise DataError(
                f"{path}, line {number}: not a record of an experiment",
                hint="Remove that line and repeat the command: its result is computed again.",
            ) from None
