"""Convert rows to items: texts, times, and the fields of a task."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from mta.data.history import Item
from mta.data.readers.rejects import HINT, Bad, Place, Records, Rejects
from mta.data.readers.stream import kind_of
from mta.data.tasks.task import Task, as_text, is_number, short
from mta.errors import DataError, InputError

log = logging.getLogger("mta")
OTHER_LABELS = f"{HINT}\n  Other labels need a task of your own:  --task mine.yaml  (docs/how-to/add-a-task.md)"
MESSAGES = "messages"  # a field of chats as trl and others train on
NO_TIME = {"", "null", "none", "nan", "nat", "na", "n/a"}  # how databases, pandas, and R write an empty cell


@dataclass(frozen=True, slots=True)
class RecordPart:
    """The items and queries of one person in one record of a file.

    ``checked``: the ids of the items have been checked, or may repeat.
    """

    person: str
    items: tuple[Item, ...]
    place: Place
    queries: tuple[Item, ...] = ()
    checked: bool = False


def text_in(row: Mapping[str, Any], field: str) -> str:
    """Return a required field, which must be text or a number, as text. Raises Bad."""
    value = row.get(field)
    if value is None:
        raise Bad(field, "empty; expected some text" if field in row else "missing")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Bad(field, f"expected text or a number, got {kind_of(value)}")
    text = as_text(value)
    if not text.strip():
        raise Bad(field, "empty; expected some text")
    if re.search("[\ud800-\udfff]", text):  # JSON can escape a lone surrogate; tokenizers and files cannot hold one
        raise Bad(field, "holds half of a surrogate pair; expected text that UTF-8 can hold")
    return text


def id_in(row: Mapping[str, Any], field: str) -> str:
    """Return an id without spaces around it: ``ann`` and `` ann`` are one person. Raises Bad."""
    return text_in(row, field).strip()


def distinct(items: Sequence[Item], known: set[str], person: str, place: Place, rejects: Rejects) -> tuple[Item, ...]:
    """Return the items with new ids, or without one, and add their ids to ``known``; the others are bad rows."""
    new = []
    for item in items:
        if item.id is not None and item.id in known:
            reason = f"duplicate item id {item.id!r} of person {person!r}; rename a field that names no items"
            rejects.add(place, "id", reason, dict(item.fields))
            continue
        new.append(item)
        if item.id is not None:
            known.add(item.id)
    return tuple(new)


def time_in(row: Mapping[str, Any], field: str) -> float | None:
    """Return seconds, or any number that grows with time; None without a time. An ISO date without a zone is UTC.

    Numbers from 1e11 on count milliseconds, microseconds, or nanoseconds since 1970 and become seconds: 1e11 seconds
    are the year 5138, and 1e11 milliseconds the year 1973.
    """
    value = row.get(field)
    if value is None or (isinstance(value, str) and value.strip().lower() in NO_TIME):
        return None
    try:
        time = _iso(value) if isinstance(value, str) else float(value)
        if isinstance(value, bool) or not math.isfinite(time):
            raise ValueError
        while abs(time) >= 1e11 and is_number(as_text(value).strip()):  # a date is in seconds
            time /= 1000
    except (TypeError, ValueError, OverflowError):
        got = short(value) if isinstance(value, str) else kind_of(value)
        raise Bad(field, f"bad time {got}; expected a number or an ISO date such as 2024-05-31") from None
    return time


def _iso(text: str) -> float:
    text = text.strip().removesuffix(" UTC")
    if is_number(text):
        return float(text)
    date = datetime.fromisoformat(f"{text}-01" if re.fullmatch(r"\d{4}-\d{2}", text) else text)
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _single_turn(row: Mapping[str, Any], question: bool) -> dict[str, str]:
    """Return ``input`` and ``output`` of chat ``messages``: one turn of the user, and the assistant's answer.

    The text of a system turn is put before the user's. A ``question`` needs no answer. Raises Bad.
    """
    turns = row[MESSAGES]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise Bad(MESSAGES, f"expected a list of turns with role and content, got {kind_of(turns)}")
    roles = [turn.get("role") for turn in turns]
    system = roles[:1] == ["system"]
    if roles[system:] not in (["user", "assistant"], ["user"] if question else None):
        given = ", ".join(map(str, roles)) or "no turns"
        raise Bad(MESSAGES, f"expected turns of user and assistant, perhaps after system; got {given}")
    texts = [text_in({MESSAGES: turn.get("content")}, MESSAGES) for turn in turns]
    asked = "\n\n".join(texts[: 1 + system])
    return {"input": asked} if question else {"input": asked, "output": texts[-1]}


class _Wanted:
    """The fields that a row must have: those of an item, or those of a question, which needs no answer.

    ``aliases``: field -> its name for any task: ``output``, and ``input`` if it is one field. ``others``: the same in
    files, where the name of another field of the task does not stand for this one.
    """

    def __init__(self, task: Task, questions: bool = False) -> None:
        form = task.query if questions and task.query else task.item
        self.task, self.questions, self.inputs = task, questions, form.inputs
        self.fields = form.inputs if questions else task.fields()
        self.aliases = {} if questions else {task.item.target: "output"}
        self.aliases |= {form.inputs[0]: "input"} if len(form.inputs) == 1 else {}
        own = {*task.fields(), *self.fields}
        self.others = {name: other for name, other in self.aliases.items() if other == name or other not in own}

    def keys(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Return the fields -> their columns in a row. Raises Bad for a missing one."""
        keys = {}
        for name in self.fields:
            there = [key for key in (name, self.others.get(name, name)) if key in row]
            if not there:
                raise Bad(name, _missing(row, self))
            keys[name] = next((key for key in there if row[key] is not None), there[0])
        return keys


def item_in(row: Mapping[str, Any], task: Task, time: str = "time", *, question: bool = False) -> Item:
    """Return the item of a row with the task's own field names, or ``input`` and ``output``. Raises Bad.

    A ``question`` has no time, and an answer in its row is not read.
    """
    keys, id = _Wanted(task, question).keys(row), None if row.get("id") in (None, "") else text_in(row, "id")
    fields = {name: text_in(row, key) for name, key in keys.items()}
    if question:
        return Item(fields, id=id, is_query=True)
    target, labels = task.item.target, task.labels_of(Item(fields))
    if labels:
        fields[target] = as_label(fields[target].strip(), labels)
    item = Item(fields, time_in(row, time), id)
    if fault := task.wrong(item):
        name, reason = fault
        raise Bad(keys[name], reason, hint=OTHER_LABELS if name == target and labels else "")
    return item


def as_label(text: str, labels: Sequence[str]) -> str:
    """Return the label for a text: ratings are often written 4.0 when the label is 4."""
    with contextlib.suppress(ValueError):
        if text not in labels and (plain := as_text(float(text))) in labels:
            return plain
    return text


def _missing(row: Mapping[str, Any], wanted: _Wanted, named: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the reason for a row without one of its fields. ``named``: field -> its column in the file."""
    task, also = wanted.task.name, {name: key for name, key in wanted.others.items() if name != key}
    known = {name: f"{name} (or {key})" for name, key in also.items()} | dict(named)
    names = ", ".join(known.get(name, name) for name in wanted.fields)
    if "input" in row and len(wanted.inputs) > 1:
        inputs = ", ".join(wanted.inputs)
        return f"missing; 'input' stands for one field, but task {task!r} has {inputs}: give each under its name"
    given = {key for key, value in row.items() if value is not None}
    got = ", ".join(sorted(given - {"person", "time", "id"})) or "none of them"
    hint = "" if also else "; if this is the wrong task, give another (--task), or the bank of that task"
    return f"missing; task {task!r} needs {names}; got {got}{hint}"


def _named_otherwise(column: str | None, columns: Mapping[str, str]) -> str:
    """Return the hint for a column that was named, and that the file does not have."""
    name = next((name for name, given in columns.items() if given == column), "person")
    return f"Name a column of the file:  --columns {name}=NAME"


def _columns_of(wanted: _Wanted, columns: Mapping[str, str]) -> tuple[dict[str, str], set[str]]:
    """Return the task's own fields, person, and time -> their columns; and which of input and output they replace.

    Raises InputError.
    """
    names = {other: name for name, other in wanted.aliases.items()}
    answer = {"output", wanted.task.item.target} - {*wanted.fields} if wanted.questions else set()
    named: dict[str, str] = {}
    for name, column in columns.items():
        if (field := names.get(name, name)) in named:
            raise InputError(
                f"two columns were given for {field!r}: {named[field]!r} and {column!r}", hint="Leave one of them out."
            )
        if name not in answer:
            named[field] = column
    if unknown := named.keys() - {"person", "time", "id", *wanted.fields}:
        raise InputError(
            f"task {wanted.task.name!r} has no field {min(unknown)!r}; its fields are {', '.join(wanted.fields)}",
            hint="Name columns of these fields, of person, or of time.",
        )
    target = wanted.task.item.target
    if shown := [name for name, column in named.items() if name != target and column == named.get(target)]:
        raise InputError(
            f"column {named[target]!r} was given for the answer {target!r} and for {shown[0]!r}",
            hint="Give each a column of its own: a prompt must not show the answer.",
        )
    return named, {other for name, other in wanted.others.items() if name in named}


def item_parts(
    records: Records,
    task: Task,
    rejects: Rejects,
    columns: Mapping[str, str] = MappingProxyType({}),
    questions: bool = False,
) -> Iterator[RecordPart]:
    """Yield one item per record: ``person``, the task's fields, and where known ``time`` and ``id``.

    With ``questions``, a record is a question and needs no answer.
    ``columns``: person, time, input, output, or one of the task's fields -> its column. Raises InputError.
    """
    wanted, unread = _Wanted(task, questions), Counter[str]()
    known = {"person", "time", "id", "input", "output", *wanted.fields, *task.fields(query=questions)}
    chats, fields = MESSAGES not in known, {"input", "output", *wanted.fields}
    known |= {MESSAGES} if chats else set()
    (named, replaced), seen = _columns_of(wanted, columns), set[str]()
    for place, record in records:
        seen |= record.keys()
        row = {name: value for name, value in record.items() if name not in (*named, *named.values(), *replaced)}
        unread.update(row.keys() - known)
        row |= {name: record[column] for name, column in named.items() if column in record}
        with rejects.skipping(place, record):
            try:
                if chats and row.get(MESSAGES) is not None and not row.keys() & fields:
                    row |= _single_turn(row, questions)
                person, items = id_in(row, "person"), (item_in(row, task, question=questions),)
            except Bad as bad:  # in the words of the file
                field, reason = bad.field or "", bad.reason
                column, other = named.get(field, bad.field), wanted.others.get(field)
                hint = bad.hint
                if not ({column, other} - replaced) & seen:  # no row of the file had the field so far
                    to = "person" if field == "person" else "these names"
                    what = "a column" if field == "person" else "the columns"
                    hint = f"Rename {what} of the file to {to}, or name its column:  --columns {other or field}=NAME"
                if named and column not in record:
                    needed = column in {*named.values(), "person"}
                    has = f"missing; the columns are {', '.join(record)}"
                    reason = has if needed else _missing(record, wanted, named)
                    hint = _named_otherwise(column, columns) if needed else hint
                raise Bad(column, reason, bad.place, hint) from None
            yield RecordPart(person, () if questions else items, place, items if questions else ())
    if wrong := sorted({*named.values()} - seen) if seen else ():
        raise DataError(
            f"{place.file} has no column {wrong[0]!r}; it has {', '.join(sorted(seen))}",
            hint=_named_otherwise(wrong[0], columns),
        )
    if unread:
        names = ", ".join(f"{short(name)} ({count} lines)" for name, count in unread.most_common(3))
        more, time = ", …" * (len(unread) > 3), named.get("time", "time")
        log.warning("ignored fields: %s%s; times are read from %r", names, more, time)
