"""Readers of tables: CSV and TSV with a header, Parquet, and folders that Hugging Face ``datasets`` saved."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any

from mta.data.readers.rejects import Place, Rejects, data_error
from mta.data.readers.stream import first_byte, opened, text_lines
from mta.errors import DataError
from mta.system.extras import require

Row = tuple[Place, dict[str, Any]]
DELIMITERS = ",;\t"


def table_in(path: Path) -> Callable[[Path, Rejects], Iterator[Row]] | None:
    """Return the reader of a table by the ending of its file or the files of its folder; None for other formats."""
    if path.is_dir():
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        return arrow_rows if saved else parquet_rows if any(path.glob("*.parquet")) else None
    if not path.suffix and first_byte(path) not in (b"", b"[", b"{"):  # standard input
        return csv_rows
    return {".csv": csv_rows, ".tsv": csv_rows, ".parquet": parquet_rows}.get(path.suffix.lower())


def csv_rows(path: Path, rejects: Rejects) -> Iterator[Row]:
    """Yield the rows of a table with a header, separated by commas, semicolons, or tabs; empty cells are None."""
    csv.field_size_limit(sys.maxsize)  # texts may be longer than the default of 128 KiB
    lines, last = text_lines(path, rejects), 0

    def counted() -> Iterator[str]:
        nonlocal last
        for number, line in lines:
            last = number
            yield f"{line}\n"

    texts = counted()
    if (head := next(texts, None)) is None:
        return
    reader = csv.reader(chain([head], texts), delimiter=max(DELIMITERS, key=head.count), strict=True)
    names: list[str] | None = None
    before = 0  # the last line of the row before
    try:
        for cells in reader:
            place, before = Place(path, before + 1), last
            if names is None:
                names = _header(cells, place)
            elif len(cells) == len(names):
                yield place, {name: cell if cell.strip() else None for name, cell in zip(names, cells)}
            elif cells:
                rejects.add(place, None, f"expected {len(names)} columns, got {len(cells)}", cells)
    except csv.Error as error:
        place = Place(path, before + 1)
        raise data_error(place, None, f"not a table: {error}", hint="Check the quotes there.") from None


def _header(cells: list[str], place: Place) -> list[str]:
    names = [cell.strip() for cell in cells]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise data_error(place, twice, "two columns have this name", hint="Rename one of them in the first line.")
    return names


def parquet_rows(path: Path, rejects: Rejects) -> Iterator[Row]:
    """Yield the rows of a Parquet file, or of all in a folder. A place counts rows, not lines."""
    require("tables")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    for file in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
        opened(file).close()  # for our errors
        try:
            with ParquetFile(file) as table:
                yield from _numbered(file, table.schema_arrow.metadata, table.iter_batches(1024))
        except ArrowException as error:
            raise _unreadable(file, error) from None


def arrow_rows(path: Path, rejects: Rejects) -> Iterator[Row]:
    """Yield the rows of one split that ``datasets`` saved with ``save_to_disk``. A place counts rows, not lines."""
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(folder.name for folder in path.iterdir() if folder.is_dir()))
        raise DataError(f"{path} holds several splits: {splits}", hint="Give the folder of one of them.")
    require("tables")
    import pyarrow

    try:
        names = [
            one["filename"] for one in json.loads((path / "state.json").read_text(encoding="utf-8"))["_data_files"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(path / "state.json", error) from None
    for file in [path / Path(name).name for name in names]:
        opened(file).close()
        try:
            with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as stream:
                yield from _numbered(file, stream.schema.metadata, stream)
        except pyarrow.ArrowException as error:
            raise _unreadable(file, error) from None


def _numbered(file: Path, metadata: Mapping[bytes, bytes] | None, batches: Any) -> Iterator[Row]:
    classes, number = _classes(metadata), 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield Place(file, number), {name: _plain(value, classes.get(name)) for name, value in row.items()}


def _classes(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the names of class labels, which ``datasets`` stores as numbers, by column."""
    features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return {name: one["names"] for name, one in features.items() if isinstance(one, dict) and "names" in one}


def _plain(value: Any, classes: list[str] | None) -> Any:
    """Return a value as JSON would hold it."""
    if classes and isinstance(value, int):
        return classes[value] if 0 <= value < len(classes) else None
    if isinstance(value, date):  # datetimes too
        return value.isoformat()
    return str(value) if isinstance(value, Decimal) else value


def _unreadable(file: Path, error: Exception) -> DataError:
    reason = str(error).partition("\n")[0]
    return DataError(f"{file} cannot be read: {reason}", hint="Write the file again, or give JSONL.")
