"""Tables: CSV, Parquet, and columns with other names."""

import csv
import io
import json
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files import fails, jsonl
from hypothesis import given
from hypothesis import strategies as st

from mta.data.history import Item, Person
from mta.data.readers import read_people
from mta.data.readers.people import FORMATS
from mta.data.readers.rejects import Rejects
from mta.data.readers.tables import csv_rows, plain
from mta.errors import DataError, InputError, MissingExtra

ROWS = 'person,text,score,time\nann,Fine.,4,2024-05-31\n007,"Broke, then\nburned.",1.0,\nann,Old.,2,2020-01\n'
PEOPLE = [
    Person(
        "ann", (Item({"text": "Old.", "score": "2"}, 1577836800.0), Item({"text": "Fine.", "score": "4"}, 1717113600.0))
    ),
    Person("007", (Item({"text": "Broke, then\nburned.", "score": "1"}),)),
]
NAMED = {"person": "user", "input": "body", "output": "stars", "time": "day"}


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    ("name", "end", "mark"),
    [("a.csv", "\n", ""), ("a.TSV", "\r\n", "\ufeff"), ("items", "\n", ""), ("a.txt", "\n", "")],
)
def test_a_table_gives_the_people_of_its_rows(tmp_path, delimiter, name, end, mark):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator=end).writerows(csv.reader(io.StringIO(ROWS)))
    assert read_people(written(tmp_path / name, mark + out.getvalue()), "lamp3") == PEOPLE


def test_columns_with_other_names(tmp_path):
    table = written(tmp_path / "a.csv", "user,body,stars,day,text\nann,Fine.,4,2024-01-01,not this\n")
    (ann,) = read_people(table, "lamp3", columns=NAMED)
    assert ann == Person("ann", (Item({"text": "Fine.", "score": "4"}, 1704067200.0),))
    lines = jsonl(tmp_path, {"user": "ann", "body": "Fine.", "stars": 4, "day": "2024-01", "person": "bob", "score": 9})
    assert read_people(lines, "lamp3", columns=NAMED) == [ann]


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("ann,Fine.\n", 2, "expected 3 columns, got 2"),
        ("ann,Fine.,4\nbob,Bad.,7\n", 3, "field 'stars': unknown label '7'; expected one of: 1, 2, 3, 4, 5"),
        ('ann,"two\nlines",4\nbob, ,2\n', 4, "field 'body': empty; expected some text"),
        ('ann,"open\n', 2, "not a table: unexpected end of data"),
    ],
)
def test_errors_name_row_and_column(tmp_path, text, place, message):
    table = written(tmp_path / "a.csv", "user,body,stars\n" + text)
    with pytest.raises(DataError) as caught:
        read_people(table, "lamp3", columns={"person": "user", "input": "body", "output": "stars"})
    assert caught.value.message.startswith(f"{table}:{place}: {message}")


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    table = written(tmp_path / "a.csv", "user,text,score\nann,Fine.,4\n")
    with pytest.raises(DataError, match="field 'person': missing"):
        read_people(table, "lamp3")
    with pytest.raises(DataError, match="field 'uesr': missing; the columns are user, text, score"):
        read_people(table, "lamp3", columns={"person": "uesr"})
    with pytest.raises(InputError, match="has no field 'input'; its fields are title, genres, rating"):
        read_people(table, "movielens-rating", columns={"person": "user", "input": "text"})
    for start in (b"PK\x03\x04", b"\x1f\x8b\x08"):
        packed = tmp_path / "table.xlsx"
        packed.write_bytes(start + b"\xec" * 9)
        fails(packed, "lamp3", f"{packed} is a workbook or compressed")
    bad = tmp_path / "c.csv"
    bad.write_bytes(b"person,text,score\nann,caf\xe9,4\n")
    hint = "Convert it, for example from Windows' encoding:  iconv -f CP1252 -t UTF-8 FILE > NEW"
    fails(bad, "lamp3", f"{bad}:2: not UTF-8: byte 0xe9; save the file as UTF-8", hint)
    with pytest.raises(DataError, match="not UTF-8"):  # such a line could be the middle of a cell
        read_people(bad, "lamp3", skip_bad=tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match=r"a\.csv has no column 'dya'; it has score, text, user"):
        read_people(table, "lamp3", columns={"person": "user", "time": "dya"})


def test_a_missing_value_is_named_in_the_words_of_the_file(tmp_path):
    named = {"person": "user", "output": "label"}
    table = written(tmp_path / "a.csv", "user,input,label,ts\nann,,4,1\n")
    with pytest.raises(DataError, match=r"a\.csv:2: field 'input': empty; expected some text"):
        read_people(table, "lamp3", columns=named)
    with pytest.raises(DataError) as caught:
        read_people(written(table, "user,body,label\nann,Fine.,4\n"), "lamp3", columns=named)
    assert caught.value.message == (
        f"{table}:2: field 'text': missing; task 'lamp3' needs text (or input), label; got body, label, user"
    )


@pytest.mark.parametrize(
    ("header", "message", "hint"),
    [
        (
            "person,film,genres,rating",
            "field 'title': missing; task 'movielens-rating' needs title, genres, rating (or output); got film, ",
            "Rename the columns of the file to these names, or name its column:  --columns title=NAME",
        ),
        (
            "user,title,genres,rating",
            "field 'person': missing",
            "Rename a column of the file to person, or name its column:  --columns person=NAME",
        ),
    ],
)
def test_a_column_that_the_whole_file_lacks_is_to_be_renamed(tmp_path, header, message, hint):
    table = written(tmp_path / "a.csv", f"{header}\nann,Heat,Crime,4\n")
    with pytest.raises(DataError) as caught:
        read_people(table, "movielens-rating")
    assert caught.value.message.startswith(f"{table}:2: {message}")
    assert caught.value.hint == hint


def test_blank_lines_and_cells_are_skipped(tmp_path):
    (ann,) = read_people(written(tmp_path / "a.csv", "\nperson,text,score\n\nann,Fine.,4\n,,\n  \n"), "lamp3")
    assert len(ann.items) == 1


def test_bad_rows_can_be_skipped(tmp_path):
    table = written(tmp_path / "a.csv", "person,text,score\nann,Fine.,4\nann,Fine\nann,Bad.,one\n")
    (ann,) = read_people(table, "lamp3", skip_bad=tmp_path / "bad.jsonl")
    assert len(ann.items) == 1
    assert [json.loads(line)["line"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == [3, 4]


def test_delimiters_within_quotes_do_not_split_names(tmp_path):
    table = written(tmp_path / "a.csv", '"person","text (a; b; c; d)","score"\n"ann","Fine.","4"\n')
    (ann,) = read_people(table, "lamp3", columns={"text": "text (a; b; c; d)"})
    assert ann.items[0].fields["text"] == "Fine."


@pytest.mark.parametrize("delimiter", ["\t", "|"])
def test_a_text_that_begins_with_a_quote_joins_no_lines(tmp_path, delimiter):
    rows = ["person,text,score", 'ann,"Fine,4', 'bob,Bad",1', "cy,Good,5"]
    table = written(tmp_path / "a.txt", "\n".join(rows).replace(",", delimiter))
    with pytest.raises(DataError, match=r"a\.txt:2: a quote at the beginning of a cell"):
        read_people(table, "lamp3")


def test_a_line_with_wrong_quotes_is_refused(tmp_path):
    path = written(tmp_path / "a.csv", 'person,text,score\nann,Fine.,5\nann,"Great" film,4\n')
    with pytest.raises(DataError, match=r"a\.csv:3: not a table: .* expected after '\"'") as caught:
        read_people(path, "lamp3", skip_bad=tmp_path / "bad.jsonl")
    assert caught.value.hint == "Write JSONL, or close the quotes around a cell, and double those in it."


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=20)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6))
def test_every_cell_is_read_as_it_was_written(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("a", "b"), *cells])
    found = [(row["a"], row["b"]) for _, row in csv_rows(path, Rejects())]
    rows = [tuple(cell if cell.strip() else None for cell in row) for row in cells]
    assert found == [row for row in rows if any(row)]


# -- Parquet -----------------------------------------------------------------------------------------------------------


def table_of(**more):
    values = {
        "person": ["ann", "007", "ann"],
        "text": ["Fine.", "Broke, then\nburned.", "Old."],
        "score": [Decimal(4), Decimal(1), Decimal(2)],
        "time": [datetime(2024, 5, 31, tzinfo=UTC), None, datetime(2020, 1, 1, tzinfo=UTC)],
    }
    return pa.table(values | more)


def test_parquet_gives_the_people_of_its_rows(tmp_path):
    pq.write_table(table_of(), tmp_path / "a.parquet")
    assert read_people(tmp_path / "a.parquet", "lamp3") == PEOPLE


def test_times_finer_than_a_microsecond_are_rounded(tmp_path):
    stamps = pa.array([1717113600_000000001, None, 1577836800_000000999], pa.timestamp("ns", "UTC"))
    pq.write_table(table_of(time=stamps), tmp_path / "a.parquet")
    assert read_people(tmp_path / "a.parquet", "lamp3") == PEOPLE


def test_values_of_numpy_and_pandas_are_read_as_numbers_and_missing():
    NA = type("NAType", (), {"__str__": lambda self: "<NA>"})()  # stands for pandas.NA
    assert [plain(one) for one in (np.float32(2.5), np.int64(3), np.bool_(True), NA)] == [2.5, 3, True, None]


def test_class_labels_are_read_by_their_names(tmp_path):
    features = {"score": {"names": ["5", "4", "1", "2"], "_type": "ClassLabel"}, "text": {"dtype": "string"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = table_of(score=[1, 2, 3]).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_people(tmp_path / "a.parquet", "lamp3") == PEOPLE
    without = table_of(score=[1, -1, 3]).replace_schema_metadata(metadata)
    pq.write_table(without, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet:2: field 'score': empty"):
        read_people(tmp_path / "a.parquet", "lamp3")


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        read_people(tmp_path / "a.parquet", "lamp3")
    with pytest.raises(DataError, match="no such file"):
        read_people(tmp_path / "b.parquet", "lamp3")
    pq.write_table(table_of(text=[["a list"], ["b"], ["c"]], time=[date(2024, 1, 1)] * 3), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet:1: field 'text': expected text or a number, got a list"):
        read_people(tmp_path / "a.parquet", "lamp3")


def test_times_that_python_cannot_hold_are_an_error(tmp_path):
    path, column = tmp_path / "a.parquet", pa.array([2**50, None, 2], pa.timestamp("ms"))
    pq.write_table(table_of(time=column), path)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read: ") as caught:
        read_people(path, "lamp3")
    assert caught.value.hint == "Write the file again, or give JSONL."


def test_two_columns_with_one_name_are_refused(tmp_path):
    table = table_of()
    pq.write_table(table.append_column("text", table["text"]), tmp_path / "a.parquet")
    message = "field 'text': two columns have this name"
    fails(tmp_path / "a.parquet", "lamp3", f"{tmp_path}/a.parquet:1: {message}", "Rename one of them.")
    for head in ("text,person,text", ",person,text,score,text,"):  # pandas' index in front, Excel's empty column behind
        csv = written(tmp_path / "b.csv", f"{head}\n")
        fails(csv, "lamp3", f"{csv}:1: {message}", "Rename one of them.")


def test_an_empty_table_is_refused_with_a_header_to_write(tmp_path):
    for text in ("", "\n \n"):
        table, header = written(tmp_path / "a.csv", text), "person,input,output,time"
        fails(
            table, "lamp3", f"{table} is empty; expected a header, such as {header}", f"Write the first line  {header}"
        )
    fails(
        written(table, "person,input,output\n"),
        "lamp3",
        f"{table} holds no people: no row could be used, 0 were bad",
        "Write at least one item, with person, input, and output.",
    )


def test_a_folder_of_tables_is_refused(tmp_path):
    written(tmp_path / "a.csv", ROWS)
    fails(tmp_path, "lamp3", f"{tmp_path} is a folder that no reader knows; expected one file", FORMATS)


def test_without_the_extra_only_parquet_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mta.system.extras.find_spec", lambda _: None)
    assert read_people(written(tmp_path / "a.csv", ROWS), "lamp3") == PEOPLE
    with pytest.raises(MissingExtra, match="extra 'tables'"):
        read_people(tmp_path / "a.parquet", "lamp3")
