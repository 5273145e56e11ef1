"""Readers of LaMP's questions and outputs, and of Per-Pcs' person files."""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from mta.data.history import Item
from mta.data.readers.rejects import Bad, Place, Records, Rejects, data_error
from mta.data.readers.rows import RecordPart, as_label, distinct, id_in, item_in, text_in
from mta.data.readers.stream import array_elements, kind_of, object_in, objects, opened
from mta.data.sharing import SAME_ITEMS, digest, missing_from, sameness
from mta.data.tasks.task import Task, short
from mta.errors import DataError
from mta_lab.readers import only_file

log = logging.getLogger("mta")


class Lamp:
    """LaMP's questions, with the outputs beside them, and Per-Pcs' person files."""

    def opens(self, path: Path) -> bool:
        return path.is_dir() and any(path.glob("*questions.json"))

    def knows(self, record: Mapping[str, Any]) -> bool:
        # A profile that is no list is a fault of the record. A column of that name in a table holds text.
        profiled = "profile" in record and "person" not in record and not isinstance(record["profile"], str)
        return profiled and ("query" in record or "input" in record)

    def parts(
        self, path: Path, records: Records | None, task: Task, rejects: Rejects, answers: bool
    ) -> Iterator[RecordPart]:
        file = questions_in(path) if records is None else path
        left = objects(file, rejects) if records is None else records
        for place, record in left:
            every = chain([(place, record)], left)
            if "query" in record:
                yield from perpcs_parts(every, task, rejects, answers)
            else:
                yield from lamp_parts(every, file, task, rejects, answers)

    def beside(self, path: Path) -> list[Path]:
        # Reading questions would take the outputs file beside them for the true answers.
        if path.is_dir():
            inside = [*path.glob("*questions.json")]
            return inside + [outputs_name(file) for file in inside]
        return [outputs_name(path)] if ".json" in path.suffixes or outputs_beside(path) else []


GOLDS = r'"golds"\s*:\s*\['


class Gold(NamedTuple):
    """The gold answer to a question, and its place in a file."""

    output: str
    place: Place


def questions_in(folder: Path) -> Path:
    """Return the questions file of a folder. Raises DataError if there are several or none."""
    return only_file(folder, "*questions.json", hint="Give the path of the file itself, or a RecBole folder (*.inter).")


def outputs_beside(questions: Path) -> Path | None:
    """Return the outputs file, which holds the gold answers, beside a questions file; None if there is none."""
    path = outputs_name(questions)
    return path if path != questions and path.exists() else None


def outputs_name(questions: Path) -> Path:
    """Return the path of the outputs file that belongs to a questions file."""
    return questions.with_name(questions.name.replace("questions", "outputs"))


def lamp_parts(
    records: Records, questions: Path, task: Task, rejects: Rejects, answers: bool = True
) -> Iterator[RecordPart]:
    """Yield one part per question. Without ``user_id``, the question's id is the person's id.

    Without an outputs file beside the questions, or without ``answers``, queries have no target: they can be answered,
    but not scored.
    """
    outputs = outputs_beside(questions) if answers else None
    golds = outputs_in(outputs, task, rejects) if outputs else None
    seen, users = set[str](), dict[str, _User]()
    for place, record in records:
        with rejects.skipping(place, {"id": record.get("id")}):
            id = _new_id(record, "id", seen)
            seen.add(id)
            named = record.get("user_id") is not None
            person = id_in(record, "user_id") if named else id
            items = distinct(_profile(record, task, place, rejects), set(), person, place, rejects)
            queries = _queries([record], answers, golds, task, place, rejects)
            users.setdefault(person, _User(named, place)).add(items, queries)
    for id, gold in (golds or {}).items():
        if id not in seen:
            rejects.add(gold.place, "id", f"no question has the id {id!r}", {"id": id, "output": gold.output})
    for person, user in _merged(users, questions).items():
        own = user.items if user.records == 1 else without_answers(task, user.items, user.queries)
        yield RecordPart(person, tuple(own), user.place, tuple(user.queries), checked=True)


@dataclass(slots=True)
class _User:
    """The items and questions of the records of one user; not ``named`` if they have no ``user_id``."""

    named: bool
    place: Place
    items: list[Item] = field(default_factory=list)
    queries: list[Item] = field(default_factory=list)
    records: int = 0

    def add(self, items: Sequence[Item], queries: Sequence[Item]) -> None:
        """Add a record; an item that is already known is not added again. LaMP may reuse an id in another record."""
        self.items += missing_from(self.items, items) if self.items else items
        self.queries += queries
        self.records += 1


def _merged(users: dict[str, _User], questions: Path) -> dict[str, _User]:
    """Merge the records without ``user_id`` that belong to one user, in the order of their question ids."""
    ids = [id for id, user in users.items() if not user.named]
    groups = same_users([users[id].items for id in ids])
    merged: dict[str, str] = {}
    for group in groups:
        first, *others = sorted((ids[n] for n in group), key=lambda id: (len(id), id))
        merged |= {id: first for id in (first, *others)}
        for id in others:
            users[first].add(users[id].items, users[id].queries)
    if len(groups) < len(ids):
        log.warning("%s: %d questions without user_id belong to %d people", questions, len(ids), len(groups))
    return {id: users[id] for id in dict.fromkeys(merged.get(id, id) for id in users)}


def same_users(records: Sequence[Sequence[Item]]) -> list[list[int]]:
    """Group the numbers of records that belong to one user: each profile lacks at most one item of the other.

    LaMP takes the question's own item out of the profile. Profiles must have ``SAME_ITEMS`` items in common.
    """
    from scipy.cluster.hierarchy import DisjointSet

    sets, first = DisjointSet(range(len(records))), dict[int, int]()
    for n, items in enumerate(records):
        digests = [int.from_bytes(digest([repr(key)])) for key in set(map(sameness, items))]
        whole = sum(digests)  # the same for any order of the items
        equal = [whole] if len(digests) >= SAME_ITEMS else []
        but_one = [whole - digest for digest in digests] if len(digests) > SAME_ITEMS else []
        for key in equal + but_one:
            sets.merge(first.setdefault(key, n), n)
    return [sorted(group) for group in sets.subsets()]


def without_answers(task: Task, items: Sequence[Item], queries: Sequence[Item]) -> list[Item]:
    """Return the items that are not one of the queries.

    LaMP removes a question's own item from the profile of that record, but not from the user's other records.
    """
    asked = {question for query in queries if (question := _question(task, query))}
    return [item for item in items if _question(task, item) not in asked]


def _question(task: Task, item: Item) -> tuple[str, ...]:
    """Return a key that an item and a query about the same text share: the inputs or, without inputs, the target."""
    names = task.item.inputs
    if names:
        return tuple(item.fields[name] for name in names) if task.asks_like_items(item) else ()
    return (task.target(item),) if task.has_target(item) else ()


def perpcs_parts(records: Records, task: Task, rejects: Rejects, answers: bool = True) -> Iterator[RecordPart]:
    """Yield one person per record, with any number of questions and, with ``answers``, the gold ones where known."""
    seen: set[str] = set()
    for place, record in records:
        with rejects.skipping(place, {"user_id": record.get("user_id")}):
            person = _new_id(record, "user_id", seen, "person")
            seen.add(person)
            items, questions = _profile(record, task, place, rejects), list_in(record, "query")
            yield RecordPart(person, items, place, _queries(questions, answers, None, task, place, rejects))


def list_in(row: Mapping[str, Any], field: str) -> list[Any]:
    """Return a required field that must be a list. Raises Bad."""
    if field not in row:
        raise Bad(field, "missing")
    if not isinstance(row[field], list):
        raise Bad(field, f"expected a list, got {kind_of(row[field])}")
    return list(row[field])


def _new_id(row: dict[str, Any], field: str, known: Container[str], what: str = "question id") -> str:
    id = id_in(row, field)
    if id in known:
        raise Bad(field, f"duplicate {what} {id!r}")
    return id


def _profile(record: dict[str, Any], task: Task, place: Place, rejects: Rejects) -> tuple[Item, ...]:
    items = []
    for number, row in enumerate(list_in(record, "profile")):
        try:
            items.append(item_in(object_in(row, expected="an object"), task, time="date"))
        except Bad as bad:
            field = f"profile[{number}]" + (f".{bad.field}" if bad.field else "")
            rejects.add(place, field, bad.reason, row)
    if not items:
        raise Bad("profile", "no item; a person needs at least one")
    return tuple(items)


def _queries(
    rows: list[Any], answers: bool, golds: Mapping[str, Gold] | None, task: Task, place: Place, rejects: Rejects
) -> tuple[Item, ...]:
    queries: dict[str, Item] = {}
    for row in rows:
        # A LaMP record holds a whole profile: write only the question to the rejects.
        kept = {key: value for key, value in row.items() if key != "profile"} if isinstance(row, dict) else row
        with rejects.skipping(place, kept):
            id = _new_id(object_in(row, "query", "a list of objects"), "id", queries)
            queries[id] = _query(row, id, answers, golds, task)
    return tuple(queries.values())


def _query(row: dict[str, Any], id: str, answers: bool, golds: Mapping[str, Gold] | None, task: Task) -> Item:
    output, place = _answer(row, id, golds) if answers else (None, None)
    if output is not None and task.labels:
        output = as_label(output, task.labels)
    try:
        query = parse_query(task, text_in(row, "input"), output, id)
    except DataError as error:
        raise Bad("input", error.message) from None
    if wrong := task.wrong(query):
        if wrong[0] == task.form(query).target:
            raise Bad("output" if place else "gold", wrong[1], place)
        raise Bad("input", f"{wrong[0]} is {wrong[1]}")
    return query


def parse_query(task: Task, input: str, output: str | None = None, id: str | None = None) -> Item:
    """Return a benchmark's ready-made question, and its gold answer where known, as a query.

    Raises DataError if the question does not match the task's wording.
    """
    form = task.query or task.item
    fields = form.parsed(input)
    if fields is None:
        raise DataError(
            f"not a question of task {task.name!r}: {short(input)}; expected {short(form.prompt)}",
            hint="Give the task of these questions, the task's fields, or a task with a pattern, as lamp3.yaml.",
        )
    if output is not None:
        fields[form.target] = output
    return Item(fields, id=id, is_query=True)


def _answer(row: dict[str, Any], id: str, golds: Mapping[str, Gold] | None) -> tuple[str | None, Place | None]:
    """Return the gold answer to a question, and its place if it comes from an outputs file."""
    if golds is None:
        return (text_in(row, "gold").strip() if row.get("gold") is not None else None), None
    if id not in golds:
        raise Bad("id", f"the outputs file has no answer for question {id!r}")
    return golds[id]


def outputs_in(outputs: Path, task: Task, rejects: Rejects, *, empty: bool = False) -> dict[str, Gold]:
    """Return question id -> answer for an outputs file. ``empty`` accepts empty answers, which only models give."""
    _check_task(outputs, task)
    answers: dict[str, Gold] = {}
    for place, row in array_elements(outputs, GOLDS, 'LaMP outputs: {"task": …, "golds": […]}'):
        with rejects.skipping(place, row):
            id = _new_id(object_in(row), "id", answers)
            blank = empty and isinstance(row.get("output"), str) and not row["output"].strip()
            answers[id] = Gold("" if blank else text_in(row, "output").strip(), place)
    return answers


def read_answers(path: Path, task: Task, *, empty: bool = False) -> dict[str, str]:
    """Return question id -> answer. ``path`` is LaMP's outputs file, the questions file beside it, or their folder.

    ``empty`` is for a model's answers: they are in the file itself, and may be empty, or no label. Raises DataError,
    which names file, line, and field.
    """
    outputs = path if empty else _outputs_of(path)
    answers = outputs_in(outputs, task, Rejects(hint="Correct the answer."), empty=empty)
    if task.labels and not empty:
        answers = {id: gold._replace(output=as_label(gold.output, task.labels)) for id, gold in answers.items()}
    for gold in () if empty else answers.values():  # a model may answer with anything
        if task.labels and gold.output not in task.labels:
            raise data_error(
                gold.place,
                "output",
                f"{gold.output!r} is no label of task {task.name!r}; expected one of {', '.join(task.labels)}",
                hint="Give the model's answers first, and the true ones with --true; or another --task.",
            )
    return {id: gold.output for id, gold in answers.items()}


def _outputs_of(path: Path) -> Path:
    questions = questions_in(path) if path.is_dir() else path
    outputs = outputs_beside(questions) or questions
    if outputs == questions and "questions" in outputs.name:
        raise DataError(f"no outputs file beside {questions}", hint="Give the path of an outputs file.")
    return outputs


def _check_task(outputs: Path, task: Task) -> None:
    """Raise DataError for answers of another task. Only numbers are compared, because LaMP-2 has several names."""
    with opened(outputs) as file:
        match = re.search(r'"task"\s*:\s*"([^"]*)"', file.read(4096).decode("utf-8", "replace"))
    if match and task.lamp and re.findall(r"\d+", match[1]) != re.findall(r"\d+", task.lamp):
        raise data_error(
            Place(outputs, 1),
            "task",
            f"holds answers for {match[1]!r}; task {task.name!r} is {task.lamp!r}",
            hint=f"Give the questions and outputs of {task.name}, another --task, or the bank of that task.",
        )


FORMAT = Lamp()
