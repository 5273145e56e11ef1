import json
import logging
import os
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from files import GOOD, TIME, fails, jsonl, lamp, question
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mta.data.describe import describe
from mta.data.history import Item, Person
from mta.data.readers import read_people
from mta.data.readers.rejects import HINT
from mta.data.readers.rows import OTHER_LABELS
from mta.data.tasks import load_task
from mta.errors import DataError, InputError, TaskError


def test_items_are_in_time_order(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path,
        {"person": " ann ", "input": "Second.", "output": 5, "time": "2024-05-31", "id": 7},
        {"person": 12, "id": "", "text": "Bob's.", "score": "1 "},
        "",
        {"person": "ann", "text": "First.", "output": 4.0, "time": 1700000000, "colour": "red"},
    )
    ann, bob = read_people(path, "lamp3")
    assert ann == Person(
        "ann",
        (
            Item({"text": "First.", "score": "4"}, 1700000000.0),
            Item({"text": "Second.", "score": "5"}, 1717113600.0, "7"),
        ),
    )
    assert bob == Person("12", (Item({"text": "Bob's.", "score": "1"}),))
    assert read_people(path, load_task("lamp3")) == [ann, bob]
    assert describe([ann, bob]) == {"people": 2, "items": 3, "min": 1, "median": 1.5, "max": 2, "queries": 0}
    assert describe([])["items"] == 0


def turns(*texts: str, roles: tuple[str, ...] = ("user", "assistant")) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


def test_rows_of_chats_are_items(tmp_path: Path) -> None:
    whole = turns("Be brief.", "Hi", "Yo", roles=("system", "user", "assistant"))
    rows = [{"user": "ann", "messages": whole}, {"user": "bob", "messages": turns("Hi", "Hello")}]
    ann, bob = read_people(rows, "text", columns={"person": "user"})
    assert ann.items == (Item({"input": "Be brief.\n\nHi", "output": "Yo"}),)
    assert bob.items == (Item({"input": "Hi", "output": "Hello"}),)
    assert read_people(jsonl(tmp_path, *rows), "text", columns={"person": "user"}) == [ann, bob]
    assert read_people(jsonl(tmp_path, {"person": "bob", **rows[1]}), "text") == [bob]
    own = {"person": "bob", "input": "Hi", "output": "Hello", "messages": "not read"}
    assert read_people([own], "text") == [bob]
    (asked,) = read_people([{"person": "bob", "messages": turns("Hi")}], "text", questions=True)
    assert asked.queries == (Item({"input": "Hi"}, is_query=True),)


def test_rows_have_the_values_that_a_table_has(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"person": "ann", "text": "Good", "score": 5, "time": date(2024, 5, 31), "note": float("nan")},
        {"person": "bob", "text": "Bad", "score": 1, "time": None, "note": 0.5},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = read_people(tmp_path / "rows.parquet", "lamp3")
    assert read_people(rows, "lamp3") == expected

    class Dataset(list[Any]):
        features: ClassVar = {"score": SimpleNamespace(names=["1", "2", "3", "4", "5"])}

    named = Dataset({**row, "score": row["score"] - 1} for row in rows)
    assert read_people(named, "lamp3") == expected
    with pytest.raises(DataError, match="rows:1: expected a mapping, got text"):  # as a frame of pandas gives
        read_people(["person", "text"], "lamp3")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("Hi", "expected a list of turns with role and content, got text"),
        (turns("Hi"), "expected turns of user and assistant, perhaps after system; got user"),
        (2 * turns("Hi", "Yo"), "got user, assistant, user, assistant"),
        (turns("Hi", " "), "field 'messages': empty"),
    ],
)
def test_chats_of_other_turns_are_bad_rows(messages: object, reason: str) -> None:
    with pytest.raises(DataError, match=f"rows:1: .*{reason}"):
        read_people([{"person": "ann", "messages": messages}], "text")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        (0, 0.0),
        ("1970-01-02", 86400.0),
        ("1970-01-01T01:00:00+01:00", 0.0),
        ("1970-02", 31 * 86400.0),
        ("19700102", 19700102.0),
        ("2009", 2009.0),
        (1381010111213, 1381010111.213),  # milliseconds, microseconds, and nanoseconds since 1970
        ("1381010111213000", 1381010111.213),
        (1381010111213000000, 1381010111.213),
        (-99999999999, -99999999999.0),
        ("9999-12-31", 253402214400.0),  # as databases write "never"
        ("1.7e9", 1.7e9),
        ("1970-01-02 00:00:00 UTC", 86400.0),
        ("", None),
        (" NULL", None),
        ("-3.5", -3.5),
        (None, None),
    ],
)
def test_times(tmp_path: Path, time: object, seconds: float | None) -> None:
    [ann] = read_people(jsonl(tmp_path, {**GOOD, "time": time}), "lamp3")
    assert ann.items[0].time == seconds


BAD_LINES: list[tuple[Any, str]] = [
    ('{"person": "ann", ', "invalid JSON: Expecting property name enclosed in double quotes"),
    ('{"person": NaN}', "invalid JSON: NaN is not JSON"),
    ('{"a":' + "[" * 100_000, "invalid JSON: nested too deeply"),
    ('"text"', "expected a JSON object, got text"),
    ({"text": "a", "score": "1"}, "field 'person': missing"),
    ({**GOOD, "text": None}, "field 'text': empty; expected some text"),
    ({**GOOD, "person": " "}, "field 'person': empty; expected some text"),
    (
        {"person": "ann", "text": "a"},
        "field 'score': missing; task 'lamp3' needs text (or input), score (or output); got text",
    ),
    ({"person": "ann", "input": "\t", "score": 1}, "field 'input': empty; expected some text"),
    ({**GOOD, "text": True}, "field 'text': expected text or a number, got true or false"),
    ({**GOOD, "text": "\ud800"}, "field 'text': holds half of a surrogate pair; expected text that UTF-8 can hold"),
    ({**GOOD, "score": 6}, "field 'score': unknown label '6'; expected one of: 1, 2, 3, 4, 5"),
    ({**GOOD, "time": "May"}, f"field 'time': bad time 'May'; {TIME}"),
    ({**GOOD, "time": True}, f"field 'time': bad time true or false; {TIME}"),
    ({**GOOD, "time": "inf"}, f"field 'time': bad time 'inf'; {TIME}"),
    ('{"person": "ann", "text": "a", "score": "1", "time": 1e999}', f"field 'time': bad time a number; {TIME}"),
    ({**GOOD, "id": "x"}, "field 'id': duplicate item id 'x' of person 'ann'; rename a field that names no items"),
]


@pytest.mark.parametrize(("row", "message"), BAD_LINES)
def test_a_bad_line_is_reported_or_written_to_the_rejects(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, row: Any, message: str
) -> None:
    path = jsonl(tmp_path, {**GOOD, "id": "x"}, row, {**GOOD, "person": "bob"})
    fails(path, "lamp3", f"{path}:2: {message}", OTHER_LABELS if "unknown label" in message else HINT)

    rejects_file = tmp_path / "new" / "bad.jsonl"
    with caplog.at_level(logging.WARNING, "mta"):
        people = read_people(path, "lamp3", skip_bad=rejects_file)
    assert [(person.id, len(person.items)) for person in people] == [("ann", 1), ("bob", 1)]
    assert caplog.messages == [f"1 bad rows of {path} were skipped; they are in {rejects_file}"]
    [reject] = map(json.loads, rejects_file.read_text(encoding="utf-8").splitlines())
    assert (reject["file"], reject["line"]) == (str(path), 2)
    said = f"field '{reject['field']}': {reject['reason']}" if reject["field"] else reject["reason"]
    assert said == message
    assert "row" in reject


def test_an_unread_field_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(tmp_path, {**GOOD, "date": "2024-05-31"}, {**GOOD, "date": "2024-06-01", "shop": "x", "time": 2})
    with caplog.at_level(logging.WARNING, "mta"):
        assert len(read_people(path, "lamp3")) == 1
    assert caplog.messages == ["ignored fields: 'date' (2 lines), 'shop' (1 lines); times are read from 'time'"]


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line[:-2] + b'\xe9"}\n')
    fails(path, "lamp3", f"{path}:2: not UTF-8: byte 0xe9; save the file as UTF-8")
    assert len(read_people(path, "lamp3", skip_bad=tmp_path / "bad.jsonl")[0].items) == 1
    path.write_bytes(b"[" + line + b",\n" + line[:-2] + b'\xe9"}]')
    fails(path, "lamp3", f"{path}:2: not UTF-8: byte 0xe9; save the file as UTF-8")


def test_several_inputs_have_to_be_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"person": "ann", "input": "Toy Story", "output": "4"})
    message = (
        "missing; 'input' stands for one field, but task 'movielens-rating' has title, genres: give each under its name"
    )
    fails(path, "movielens-rating", f"{path}:1: field 'title': {message}")
    named = jsonl(tmp_path, {"person": "ann", "title": "Toy Story", "genres": "Comedy", "output": 4})
    assert read_people(named, "movielens-rating")[0].items[0].fields["rating"] == "4"


def test_nothing_to_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    fails(path, "text", f"no such file: {path}")
    for content in ("", " \n\n", "\ufeff"):
        path.write_text(content, encoding="utf-8")
        fails(path, "text", f"{path} is empty; expected JSONL with one item per line, or a JSON array")
    path.write_text("[]", encoding="utf-8")
    fails(path, "text", f"{path} holds no people: no row could be used, 0 were bad")
    jsonl(tmp_path, {"person": "ann"})
    rejects_file = tmp_path / "bad.jsonl"
    with pytest.raises(DataError, match=r"holds no people: no row could be used, 1 were bad\n  See .*bad.jsonl"):
        read_people(path, "text", skip_bad=rejects_file)
    assert rejects_file.exists()


def test_unknown_formats_name_what_was_found(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"user": "ann", "review": "Fine."})
    fails(path, "lamp3", f"{path}:1: unknown format: this record has user, review")
    path = jsonl(tmp_path, {})
    with pytest.raises(DataError, match="this record has nothing\n  Give JSONL, CSV, or Parquet with person"):
        read_people(path, "lamp3")
    path = jsonl(tmp_path, {"exported": "2024-05-31"}, {}, GOOD)
    assert len(read_people(path, "lamp3", skip_bad=tmp_path / "bad.jsonl")) == 1
    bad = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(one["line"], one["row"]) for one in bad] == [(1, {"exported": "2024-05-31"}), (2, {})]
    (tmp_path / "data.csv").write_text("user,review\nann,Fine.\n", encoding="utf-8")
    with pytest.raises(DataError, match="this record has user, review"):  # as all rows of a table
        read_people(tmp_path / "data.csv", "lamp3", skip_bad=tmp_path / "bad.jsonl")


def test_invalid_arguments_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path, GOOD)
    with pytest.raises(TaskError, match="unknown task 'nope'"):
        read_people(path, "nope")
    with pytest.raises(InputError, match=r"bad rows cannot be written to .*data\.jsonl: it is an input file"):
        read_people(path, "lamp3", skip_bad=path)
    with pytest.raises(InputError, match="it is a folder; expected the name of a file"):
        read_people(path, "lamp3", skip_bad=tmp_path)
    lamp(tmp_path, [question("1")], {"1": "4"})
    for file in ("dev_questions.json", "dev_outputs.json"):
        for source in (tmp_path, tmp_path / "dev_questions.json"):
            with pytest.raises(InputError, match="it is an input file"):
                read_people(source, "lamp3", skip_bad=tmp_path / file)


@pytest.mark.parametrize("source", ["-", "/dev/zero", "fifo", "fifo.csv", "fifo.parquet"])
def test_what_can_be_read_only_once_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    if source.startswith("fifo"):
        os.mkfifo(source)
    fails(Path(source), "lamp3", f"{source} is standard input, a pipe, or a device; expected a file")


def test_copies_of_a_persons_items_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mta"):
        read_people(jsonl(tmp_path, GOOD, GOOD, {**GOOD, "person": "other"}, {**GOOD, "time": 5}), "lamp3")
    assert "1 items repeat an item of the same person" in caplog.text


def test_rejects_are_written_only_when_all_input_was_read(tmp_path: Path) -> None:
    rejects_file = tmp_path / "bad.jsonl"
    earlier = json.dumps({"file": "old.jsonl", "line": 7, "field": None, "reason": "invalid JSON"}) + "\n"
    rejects_file.write_text(earlier, encoding="utf-8")
    path = tmp_path / "data.json"
    path.write_text(f'[{json.dumps(GOOD)}, 3, {{"person": ]', encoding="utf-8")
    with pytest.raises(DataError, match="invalid JSON"):  # nothing in an array can be read behind a fault
        read_people(path, "lamp3", skip_bad=rejects_file)
    assert rejects_file.read_text(encoding="utf-8") == earlier
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl", "data.json"]
    read_people(jsonl(tmp_path, GOOD), "lamp3", skip_bad=rejects_file)
    assert rejects_file.read_text(encoding="utf-8") == ""


TEXT = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
ROWS = st.lists(
    st.tuples(st.sampled_from(["ann", "Bob ", "çiğdem"]), TEXT, TEXT, st.none() | st.floats(-1e9, 1e9)), min_size=1
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=ROWS, ascii=st.booleans(), array=st.booleans())
def test_written_records_are_read_back(
    tmp_path: Path, rows: list[tuple[str, str, str, float | None]], ascii: bool, array: bool
) -> None:
    records = [{"person": p, "input": i, "output": o, "time": t} for p, i, o, t in rows]
    texts = [json.dumps(record, ensure_ascii=ascii) for record in records]
    path = tmp_path / "data"
    path.write_text("[" + " ,\n".join(texts) + "]\n" if array else "\n".join(texts), encoding="utf-8")
    people = read_people(path, "text")
    expected: dict[str, list[Item]] = {}
    for p, i, o, t in rows:
        expected.setdefault(p.strip(), []).append(Item({"input": i, "output": o}, t))
    assert people == [Person.of(id, items) for id, items in expected.items()]
