"""Handling of bad rows: raise an error, or write them to a file of rejects."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

from mta.errors import DataError
from mta.system.atomic import written_aside

HINT = "Correct the row, or write bad rows to a file with --skip-bad FILE (in Python: skip_bad=FILE)."


class Place(NamedTuple):
    """A line of a file."""

    file: Path
    line: int


class Bad(Exception):
    """A row that does not fit. Readers catch this error and pass it to ``Rejects``; it never leaves this package."""

    def __init__(self, field: str | None, reason: str, place: Place | None = None) -> None:
        super().__init__(field, reason, place)
        self.field = field
        self.reason = reason
        self.place = place  # of the fault, if it is not in the row itself


def data_error(place: Place, field: str | None, reason: str, hint: str) -> DataError:
    """Return the error for a place in a file; ``field`` is None if the whole line is wrong."""
    where = f"field {field!r}: " if field else ""
    return DataError(f"{place.file}:{place.line}: {where}{reason}", hint=hint)


class Rejects:
    """Raise an error at the first bad row or, given a path, count bad rows and write them there as JSONL.

    The file appears under its name when all input was read. Only its owner may read it, because it holds people's text.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.count = 0
        self._file: IO[bytes] | None = None
        self._open = ExitStack()

    def __enter__(self) -> Rejects:
        if self.path is not None:
            self._file = self._open.enter_context(written_aside(self.path))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.__exit__(kind, error, at)

    def add(self, place: Place, field: str | None, reason: str, row: Any = None) -> None:
        """Record one bad row. Raises DataError if there is no file of rejects."""
        if self._file is None:
            raise data_error(place, field, reason, hint=HINT)
        self.count += 1
        record = {"file": str(place.file), "line": place.line, "field": field, "reason": reason}
        self._file.write(json.dumps(record if row is None else {**record, "row": row}).encode() + b"\n")
