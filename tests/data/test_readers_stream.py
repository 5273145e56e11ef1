import json
import tracemalloc
from pathlib import Path

import pytest
from files import GOOD

from mta.data.readers import Rejects, iter_parts, read_people, stream
from mta.data.tasks import load_task
from mta.errors import DataError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"b": x}]', "2: element 2: invalid JSON: Expecting value"),
        ('[{"a": 1}\n {"b": 2}]', "2: element 1: expected ',' or ']' after an element of the array"),
        ('[{"a": 1},\n{"b": [', "2: element 2: invalid JSON: Expecting value"),
        ('[{"a": 1},\n\n', "3: element 1: the file ends inside an array: the file is incomplete"),
        ('[{"a": "\n"}]', "1: element 1: invalid JSON: Invalid control character at"),
        ('[{"a": 1}]\n[{"b": 2}]', "2: element 1: text after the end of the array"),
        ('[]\n{"b": 2}', "2: text after the end of the array"),
        ('[{"a": 1},\n{"b": Infinity}]', "2: element 2: invalid JSON: Infinity is not JSON"),
    ],
)
def test_a_fault_in_an_array_names_its_line_and_element(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(stream.array_elements(path))
    assert caught.value.message == f"{path}:{message}"
    assert caught.value.hint == "The rest of the array cannot be read: correct that line, or write one item per line."


def test_elements_have_places(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('\n[ 12345,\n{"a":\n "\u00e9\u20ac"},\n\n[]]', encoding="utf-8")
    assert list(stream.array_elements(path)) == [((path, 2, 1), 12345), ((path, 3, 2), {"a": "é€"}), ((path, 6, 3), [])]


def test_lines_are_read_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "data"
    row = json.dumps({**GOOD, "text": "x" * 10_000})
    path.write_text(f"{row}\n" * 2000, encoding="utf-8")
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    try:
        assert sum(1 for _ in iter_parts(path, load_task("lamp3"), Rejects())) == 2000
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_a_bad_row_of_an_array_on_one_line_is_named_by_its_element(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, GOOD, {**GOOD, "score": 9}]), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_people(path, "lamp3")
    assert caught.value.message.startswith(f"{path}:1: element 3: field 'score': unknown label '9'")
    read_people(path, "lamp3", skip_bad=tmp_path / "bad.jsonl")
    reject = json.loads((tmp_path / "bad.jsonl").read_text(encoding="utf-8"))
    assert (reject["line"], reject["element"]) == (1, 3)
