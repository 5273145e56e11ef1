import json
import tracemalloc
from pathlib import Path

import pytest
from files import GOOD

from mta.data.readers import Rejects, iter_parts, stream
from mta.data.tasks import load_task
from mta.errors import DataError


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"b": x}]', "2: invalid JSON: Expecting value"),
        ('[{"a": 1}\n {"b": 2}]', "2: expected ',' or ']' after an element of the array"),
        ('[{"a": 1},\n]', "2: a comma before the end of the array"),
        ('[{"a": 1},\n{"b": [', "2: invalid JSON: Expecting value"),
        ('[{"a": 1},\n{"b": "c', "2: invalid JSON: Unterminated string starting at"),
        ('[{"a": 1},\n\n', "3: the file ends inside an array: the file is incomplete"),
        ('[{"a": "\n"}]', "1: invalid JSON: Invalid control character at"),
        ('[{"a": 1},\n{"b": Infinity}]', "2: invalid JSON: Infinity is not JSON"),
    ],
)
def test_a_fault_in_an_array_names_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, text: str, message: str
) -> None:
    monkeypatch.setattr(stream, "CHUNK", chunk)
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(stream.array_elements(path))
    assert caught.value.message == f"{path}:{message}"
    assert caught.value.hint == "The rest of the array cannot be read: correct that line, or write one item per line."


def test_elements_have_line_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK", 3)
    path = tmp_path / "data.json"
    path.write_text('\n[ 12345,\n{"a":\n "\u00e9\u20ac"},\n\n[]]', encoding="utf-8")
    assert list(stream.array_elements(path)) == [(2, 12345), (3, {"a": "é€"}), (6, [])]


@pytest.mark.parametrize("array", [False, True])
def test_a_file_is_read_in_parts(tmp_path: Path, array: bool) -> None:
    path = tmp_path / "data"
    row = json.dumps({**GOOD, "text": "x" * 10_000})
    path.write_text("[" + ",\n".join([row] * 2000) + "]" if array else f"{row}\n" * 2000, encoding="utf-8")
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    try:
        assert sum(1 for _ in iter_parts(path, load_task("lamp3"), Rejects())) == 2000
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()
