"""Read all people of a file or folder in any supported format."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from mta.config import plugins
from mta.data.history import Item, People, Person
from mta.data.readers.rejects import Place, Records, Rejects, data_error
from mta.data.readers.rows import MESSAGES, RecordPart, distinct, item_parts
from mta.data.readers.stream import kind_of, objects
from mta.data.readers.tables import plain, table_in
from mta.data.sharing import connected, repeated
from mta.data.tasks.load import load_task
from mta.data.tasks.task import Task
from mta.errors import DataError, InputError
from mta.system.assets import ASSETS, resolve

FORMATS = (
    "Give JSONL, CSV, or Parquet with person, input and output (or the task's own fields, or messages) in each row, or "
    "name other columns with --columns; LaMP (id, input, profile); Per-Pcs (user_id, profile, query); or a "
    "RecBole folder (*.inter, *.item)."
)
log = logging.getLogger("mta")


class Format(Protocol):
    """A format of people's items that another package reads; ``mta_lab.readers`` has examples.

    An entry point of the group ``mta.readers`` names an object with these methods.
    """

    def opens(self, path: Path) -> bool:
        """Return whether a path has this format, by names of files alone."""

    def knows(self, record: Mapping[str, Any]) -> bool:
        """Return whether the first record of a JSON file has this format."""

    def parts(
        self, path: Path, records: Records | None, task: Task, rejects: Rejects, answers: bool
    ) -> Iterator[RecordPart]:
        """Yield people's items; a person may come in many parts. Raises DataError.

        ``records`` are those of a file that it ``knows``; None for a path that it ``opens``. Without ``answers``,
        questions need none.
        """

    def beside(self, path: Path) -> list[Path]:
        """Return the files that are read with a path or in it, whether or not they exist."""


def formats() -> list[Format]:
    """Return the formats of all installed packages."""
    return [plugins.load("mta.readers", name) for name in plugins.names("mta.readers")]


def read_people(
    source: str | Path | Iterable[Mapping[str, Any]],
    task: str | Path | Task,
    *,
    columns: Mapping[str, str] | None = None,
    skip_bad: str | Path | None = None,
    questions: bool = False,
) -> People:
    """Return the people of a file, a folder, or a data asset, each with their items in time order.

    ``source`` may also be rows: a dataset of the library ``datasets``, or any mappings.
    With ``questions``, the rows of a table are questions. They need no answer, and become the people's ``queries``.
    ``columns`` maps ``person``, ``input``, ``output``, ``time``, or a field of the task to the column's name in the
    file. People who have copies of the same items get the same ``group``.
    Bad rows are written to the file ``skip_bad`` as JSONL: {file, line, field, reason, row}, in arrays also element.
    Without ``skip_bad``, a bad row raises DataError, which names file, line, and field. Raises TaskError, InputError.
    """
    if isinstance(source, str):
        source = Path(resolve(source) if source in ASSETS else os.path.expanduser(source))
    task, path = load_task(task), source if isinstance(source, Path) else Path("rows")
    rejects_file = _rejects_path(skip_bad, path)
    gathered: dict[str, tuple[list[Item], list[Item], set[str]]] = {}  # person -> items, queries, ids of items
    with Rejects.to(rejects_file) as rejects:
        if isinstance(source, Path):
            parts = iter_parts(source, task, rejects, columns, questions)
        else:
            parts = item_parts(_records_in(source, path, rejects), task, rejects, columns or {}, questions)
        for part in parts:
            items, queries, ids = gathered.setdefault(part.person, ([], [], set()))
            items += part.items if part.checked else distinct(part.items, ids, part.person, part.place, rejects)
            queries += part.queries
    if rejects.count:
        log.warning("%d bad rows of %s were skipped; they are in %s", rejects.count, path, rejects_file)
    people = [Person.of(id, items, queries) for id, (items, queries, _) in gathered.items()]
    if not people:
        see = f"See {rejects_file}." if rejects.count else "Write at least one item, with person, input, and output."
        raise DataError(f"{path} holds no people: no row could be used, {rejects.count} were bad", hint=see)
    if questions:
        if asked := [person for person in people if person.queries]:
            return People(asked, task)
        hint = "Give rows with person and input, or LaMP's or Per-Pcs's questions."
        raise DataError(f"{path} holds no questions", hint=hint)
    if copies := repeated(people):
        log.warning("%s: %d items repeat an item of the same person; if they are copies, remove them", path, copies)
    people, shared = connected(people, task)
    if shared.people:
        log.warning("%s: %s; splits keep a group together", path, shared)
    return People(people, task)


def _records_in(rows: Iterable[Mapping[str, Any]], name: Path, rejects: Rejects) -> Records:
    """Yield given rows with the values of a table's; class labels of a dataset get their names."""
    features = getattr(rows, "features", None) or {}
    classes = {key: kind.names for key, kind in features.items() if hasattr(kind, "names")}
    for place, row in ((Place(name, number), row) for number, row in enumerate(rows, 1)):
        if isinstance(row, Mapping):
            yield place, {str(key): plain(value, classes.get(key)) for key, value in row.items()}
        else:
            hint = "Give mappings of fields; of a pandas frame:  frame.to_dict('records')"
            rejects.add(place, None, f"expected a mapping, got {kind_of(row)}", hint=hint)


def iter_parts(
    path: Path, task: Task, rejects: Rejects, columns: Mapping[str, str] | None = None, questions: bool = False
) -> Iterator[RecordPart]:
    """Yield people's items in the order of the file; a person may come in many parts. Raises DataError, InputError."""
    if known := next((one for one in formats() if one.opens(path)), None):
        if columns:
            raise InputError(f"{path} has a format with known columns", hint="Leave the columns out.")
        yield from known.parts(path, None, task, rejects, answers=not questions)
        return
    if path.is_dir():
        raise DataError(f"{path} is a folder that no reader knows; expected one file", hint=FORMATS)
    table = table_in(path)
    records = table(path, rejects) if table else objects(path, rejects)
    for place, record in records:
        keys, every = record.keys(), chain([(place, record)], records)
        if columns:
            yield from item_parts(every, task, rejects, columns, questions)
        elif known := next((one for one in formats() if one.knows(record)), None):
            yield from known.parts(path, every, task, rejects, answers=not questions)
        elif keys & {"person", "input", "output", MESSAGES, *task.fields()}:
            yield from item_parts(every, task, rejects, questions=questions)
        else:
            reason = f"unknown format: this record has {', '.join(map(str, keys)) or 'nothing'}"
            if table:  # as all its rows
                raise data_error(place, None, reason, hint=FORMATS)
            rejects.add(place, None, reason, record, hint=FORMATS)


def _rejects_path(skip_bad: str | Path | None, source: Path) -> Path | None:
    """Return the file for bad rows, which is replaced. Raises InputError for a folder or an input file."""
    if skip_bad is None:
        return None
    path = Path(os.path.expanduser(skip_bad))
    if path.is_dir() or is_read(path, source):
        raise InputError(
            f"bad rows cannot be written to {path}: it is {'a folder' if path.is_dir() else 'an input file'}; "
            "expected the name of a file",
            hint="Name a file that does not exist yet, for example rejects.jsonl.",
        )
    return path


def is_read(path: Path, source: Path) -> bool:
    """Return whether ``path`` is a file that reading ``source`` reads, so that nothing must be written to it."""
    files = [source, *(file for one in formats() for file in one.beside(source))]
    return path.resolve() in {file.resolve() for file in files}
