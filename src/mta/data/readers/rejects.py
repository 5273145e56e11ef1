"""Handling of bad rows: raise an error, or write them to a file of rejects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from mta.errors import DataError
from mta.system.atomic import replacing

HINT = "Correct the row, or write bad rows to a file with --skip-bad FILE (in Python: skip_bad=FILE)."


class Place(NamedTuple):
    """A line of a file. ``element`` counts from 1 in a JSON array, which may be one long line; elsewhere it is None."""

    file: Path
    line: int
    element: int | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f": element {self.element}" if self.element else "")


Records = Iterator[tuple[Place, dict[str, Any]]]


class Bad(Exception):
    """A row that does not fit. Readers catch this error and pass it to ``Rejects``; it never leaves this package."""

    def __init__(self, field: str | None, reason: str, place: Place | None = None, hint: str = "") -> None:
        super().__init__(field, reason, place, hint)
        self.field = field
        self.reason = reason
        self.place = place  # of the fault, if it is not in the row itself
        self.hint = hint  # instead of HINT


def data_error(place: Place, field: str | None, reason: str, hint: str) -> DataError:
    """Return the error for a place in a file; ``field`` is None if the whole line is wrong."""
    where = f"field {field!r}: " if field else ""
    return DataError(f"{place}: {where}{reason}", hint=hint)


@dataclass(slots=True)
class Rejects:
    """Raise an error at the first bad row or, given a file, count bad rows and write them there as JSONL."""

    file: IO[bytes] | None = None
    count: int = 0
    hint: str = HINT

    @classmethod
    @contextmanager
    def to(cls, path: Path | None) -> Iterator[Rejects]:
        """Write bad rows to ``path``, if given; the file appears under its name after the block.

        Only its owner may read the file, because it holds people's text.
        """
        with replacing(path) if path else nullcontext() as file:
            yield cls(file)

    @contextmanager
    def skipping(self, place: Place, row: Any) -> Iterator[None]:
        """Record the row if the block raises Bad. Raises DataError as ``add``."""
        try:
            yield
        except Bad as bad:
            self.add(bad.place or place, bad.field, bad.reason, row, bad.hint)

    def add(self, place: Place, field: str | None, reason: str, row: Any = None, hint: str = "") -> None:
        """Record one bad row. Raises DataError if there is no file of rejects."""
        if self.file is None:
            raise data_error(place, field, reason, hint=hint or self.hint)
        self.count += 1
        at = {"line": place.line} | ({"element": place.element} if place.element else {})
        record = {"file": str(place.file), **at, "field": field, "reason": reason}
        line = json.dumps(record if row is None else {**record, "row": row}, default=str)
        self.file.write(f"{line}\n".encode())
