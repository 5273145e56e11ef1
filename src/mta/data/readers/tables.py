"""Readers of tables: CSV and TSV with a header, and Parquet."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any

from mta.data.readers.rejects import Place, Records, Rejects, data_error
from mta.data.readers.stream import first_bytes, opened, text_lines
from mta.errors import DataError
from mta.system.extras import require

CSV = (".csv", ".tsv")
JSON = (".json", ".jsonl", ".ndjson")
DELIMITERS = ",;\t|"


def table_in(path: Path) -> Callable[[Path, Rejects], Records] | None:
    """Return the reader of a table by its name and first bytes; None for other formats. Raises DataError."""
    suffix = path.suffix.lower()
    if suffix == ".parquet" or (start := first_bytes(path)) == b"PAR1":
        return parquet_rows
    if start == b"PK\x03\x04" or start[:2] == b"\x1f\x8b":
        raise DataError(
            f"{path} is a workbook or compressed", hint="Save the sheet as CSV in UTF-8, or unpack the file."
        )
    is_json = suffix in JSON or (suffix not in CSV and start[:1] in (b"", b"[", b"{"))
    return None if is_json else csv_rows


def csv_rows(path: Path, rejects: Rejects) -> Records:
    """Yield the rows of a table with a header, separated by commas, semicolons, tabs, or bars.

    Blank cells are None, and rows of blank cells are skipped.
    Raises DataError for a table that cannot be split into rows: bytes that are not UTF-8, open quotes.
    """
    csv.field_size_limit(sys.maxsize)  # texts may be longer than the default of 128 KiB
    lines = text_lines(path)
    begin, head = next(((number, text) for number, text in lines if text.strip()), (0, ""))
    if not head:
        header = "person,input,output,time"
        raise DataError(f"{path} is empty; expected a header, such as {header}", hint=f"Write the first line  {header}")
    delimiter = max(DELIMITERS, key=re.sub('"[^"]*"', "", head).count)  # the most frequent one outside of quotes
    records = _records(Place(path, begin), chain([head], (text for _, text in lines)), delimiter)
    place, cells = next(records)
    names = [cell.strip() for cell in cells]
    _check_distinct(names, place)
    for place, cells in records:
        if not any(cell.strip() for cell in cells):
            continue
        if delimiter in "\t|" and any(delimiter in cell and "\n" in cell for cell in cells):
            rejects.add(place, None, "a quote at the beginning of a cell joins this line and the next", cells)
        elif len(cells) == len(names):
            yield place, {name: cell if cell.strip() else None for name, cell in zip(names, cells)}
        else:
            rejects.add(place, None, f"expected {len(names)} columns, got {len(cells)}", cells)


def _records(begin: Place, lines: Iterable[str], delimiter: str) -> Iterator[tuple[Place, list[str]]]:
    """Yield the cells of each record, the header first; ``begin`` is its place. Raises DataError for wrong quotes."""
    reader, read = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True), 0
    try:
        for cells in reader:
            yield begin._replace(line=begin.line + read), cells
            read = reader.line_num
    except csv.Error as error:
        hint = "Write JSONL, or close the quotes around a cell, and double those in it."
        raise data_error(begin._replace(line=begin.line + read), None, f"not a table: {error}", hint=hint) from None


def _check_distinct(names: list[str], place: Place) -> None:
    if twice := next((name for name in names if name and names.count(name) > 1), None):  # unnamed ones are not read
        raise data_error(place, twice, "two columns have this name", hint="Rename one of them.")


def parquet_rows(path: Path, rejects: Rejects) -> Records:
    """Yield the rows of a Parquet file. A place counts rows, not lines. Raises DataError for a damaged file."""
    require("tables")
    import pyarrow
    from pyarrow.parquet import ParquetFile

    opened(path).close()
    try:
        table = ParquetFile(path)
        names, classes = table.schema_arrow.names, _classes(table.schema_arrow.metadata)
        _check_distinct(names, Place(path, 1))
        fields = [
            one.with_type(pyarrow.timestamp("us", one.type.tz)) if str(one.type).startswith("timestamp[ns") else one
            for one in table.schema_arrow
        ]  # Python's times have no nanoseconds
        schema = pyarrow.schema(fields)
        batches = (one.cast(schema, safe=False).to_pydict().values() for one in table.iter_batches(1024))
        for number, row in enumerate((row for columns in batches for row in zip(*columns)), 1):
            yield Place(path, number), {name: plain(value, classes.get(name)) for name, value in zip(names, row)}
    except DataError:  # a ValueError, too
        raise
    except (OSError, ValueError, KeyError, TypeError, OverflowError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path} cannot be read: {reason}", hint="Write the file again, or give JSONL.") from None


def _classes(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the names of class labels, which ``datasets`` stores as numbers, by column."""
    info = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info") or {}
    features = info.get("features") or {}
    return {name: one["names"] for name, one in features.items() if isinstance(one, dict) and "names" in one}


def plain(value: Any, classes: list[str] | None = None) -> Any:
    """Return a value of a field as JSON would hold it."""
    if classes and isinstance(value, int):
        return classes[value] if 0 <= value < len(classes) else None
    if type(value).__name__ in ("NAType", "NaTType"):  # of pandas
        return None
    if getattr(value, "ndim", None) == 0:  # a number of numpy
        value = value.item()
    if isinstance(value, date):  # datetimes too
        return value.isoformat()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):  # text that the writer did not mark as text; other bytes are no text
        return value.decode("utf-8", "surrogateescape")
    return value if value is None or isinstance(value, str | int | list | dict) else str(value)
