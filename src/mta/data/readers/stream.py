"""Read the JSON values of a file with their places: JSONL line by line, or the elements of one array."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mta.data.readers.rejects import Bad, Place, Records, Rejects, data_error
from mta.errors import DataError

HEAD = 1 << 20  # bytes in which a file must begin
LINE = '{"person": "ann", "input": "Broke in a week.", "output": "1"}'
UTF8 = "Convert it, for example from Windows' encoding:  iconv -f CP1252 -t UTF-8 FILE > NEW"
SPACE = re.compile(r"[ \t\r\n]*")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_no_constant)


def kind_of(value: Any) -> str:
    """Return JSON's name for the type of a value, for messages."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def object_in(value: Any, field: str | None = None, expected: str = "a JSON object") -> dict[str, Any]:
    """Return a value that must be a JSON object. Raises Bad."""
    if not isinstance(value, dict):
        raise Bad(field, f"expected {expected}, got {kind_of(value)}")
    return value


def opened(path: Path) -> BinaryIO:
    """Open a file for reading. Raises DataError for what can be read only once, and instead of OSError."""
    try:
        if path == Path("-") or path.is_fifo() or path.is_char_device():
            hint = "Write it to a file first, and give the name of that file:  COMMAND > history.jsonl"
            raise DataError(f"{path} is standard input, a pipe, or a device; expected a file", hint=hint)
        return path.open("rb")
    except FileNotFoundError:
        raise DataError(
            f"no such file: {path}", hint="Check the path, or give the folder of a LaMP or RecBole download."
        ) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", hint="Check that it is a file, and its permissions."
        ) from None


def text_lines(path: Path, rejects: Rejects | None = None) -> Iterator[tuple[int, str]]:
    """Yield numbered lines without line ends. A line that is not UTF-8 is a bad row, or without rejects an error."""
    with opened(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                if rejects is None:
                    raise data_error(Place(path, number), None, _not_utf8(error), hint=UTF8) from None
                rejects.add(Place(path, number), None, _not_utf8(error), hint=UTF8)
                continue
            yield number, text.rstrip("\r\n")


def objects(path: Path, rejects: Rejects) -> Records:
    """Yield the JSON objects of a JSONL file or of one array. Raises DataError if the file is empty."""
    start = first_bytes(path)
    if not start:
        raise DataError(
            f"{path} is empty; expected JSONL with one item per line, or a JSON array",
            hint=f"Write lines such as  {LINE}",
        )
    for place, value in array_elements(path) if start[:1] == b"[" else json_lines(path, rejects):
        with rejects.skipping(place, value):
            yield place, object_in(value)


def first_bytes(path: Path) -> bytes:
    """Return the first bytes of a file from one that is not white space; empty without one."""
    with opened(path) as file:
        return file.read(HEAD).removeprefix(codecs.BOM_UTF8).lstrip()[:4]


def json_lines(path: Path, rejects: Rejects) -> Iterator[tuple[Place, Any]]:
    """Yield the values of a JSONL file; blank lines are skipped."""
    for number, text in text_lines(path, rejects):
        if not text.strip():
            continue
        place = Place(path, number)
        try:
            value = DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            rejects.add(place, None, _not_json(error), text)
            continue
        yield place, value


def array_elements(path: Path, opening: str = r"\s*\[", named: str = "array") -> Iterator[tuple[Place, Any]]:
    """Yield the elements of the array that begins behind the first match of ``opening``, decoded one by one.

    The text of the file is held in memory. ``named`` names the array in errors. Raises DataError at the first fault:
    the start of the next element is then unknown.
    """
    text, begin = _begun(path, opening, named)
    line, counted, element = 1, 0, 0

    def place(at: int) -> Place:
        return Place(path, line + text.count("\n", counted, at), element or None)

    def fail(reason: str, at: int) -> NoReturn:
        hint = "The rest of the array cannot be read: correct that line, or write one item per line."
        raise data_error(place(at), None, reason, hint)

    def next_at(at: int) -> int:
        """Return the position of the next character that is not a space."""
        at = SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        return at if at < len(text) else fail("the file ends inside an array: the file is incomplete", at)

    at = next_at(begin.end())
    while text[at] != "]":
        element += 1
        line, counted = place(at).line, at
        try:
            value, end = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            fail(_not_json(error), getattr(error, "pos", at))
        yield Place(path, line, element), value
        at = next_at(end)
        if text[at] == ",":  # the last one may be followed by the end
            at = next_at(at + 1)
        elif text[at] != "]":
            fail("expected ',' or ']' after an element of the array", at)
    if begin.start() == 0 and text[at + 1 :].strip():
        fail("text after the end of the array", next_at(at + 1))


def _begun(path: Path, opening: str, named: str) -> tuple[str, re.Match[str]]:
    """Return the text of a file, and where ``opening`` matches. Raises DataError."""
    with opened(path) as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = Place(path, 1 + error.object.count(b"\n", 0, error.start))
        raise data_error(place, None, _not_utf8(error), hint=UTF8) from None
    if begin := re.search(opening, text):
        return text, begin
    raise data_error(Place(path, 1), None, f"found no {named}", f"Give a file with {named}.")


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON: {error.msg}"
    return "invalid JSON: nested too deeply" if isinstance(error, RecursionError) else f"invalid JSON: {error}"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x}; save the file as UTF-8"
