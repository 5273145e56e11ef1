"""Stream the JSON values of a file with their places: JSONL, or the elements of one array."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mta.data.readers.rejects import Bad, Place, Rejects, data_error
from mta.errors import DataError

CHUNK = 1 << 20
LINE = '{"person": "ann", "input": "Broke in a week.", "output": "1"}'
UTF8 = "Convert it, for example from Windows' encoding:  iconv -f CP1252 -t UTF-8 FILE > NEW"
UTF16 = ("is UTF-16; expected UTF-8", "Convert it:  iconv -f UTF-16 -t UTF-8 FILE > NEW")
UNREADABLE = {  # the first bytes of a file -> what it is, and what to do
    b"\x1f\x8b": ("is compressed with gzip; expected text", "Decompress it first, with  gunzip"),
    b"PK\3\4": ("is a zip or Excel file; expected text", "Unzip it first, or save the sheet as CSV in UTF-8."),
    codecs.BOM_UTF16_LE: UTF16,
    codecs.BOM_UTF16_BE: UTF16,
}
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
    """Open a file for reading. Raises DataError instead of OSError."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise DataError(
            f"no such file: {path}", hint="Check the path, or give the folder of a LaMP or RecBole download."
        ) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}", hint="Check that it is a file, and its permissions."
        ) from None


def only_file(folder: Path, pattern: str, hint: str) -> Path:
    """Return the file of a folder that matches ``pattern``. Raises DataError if there are several or none."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{folder}: expected one file {pattern}, got {names}", hint=hint)
    return found[0]


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


def objects(path: Path, rejects: Rejects) -> Iterator[tuple[Place, dict[str, Any]]]:
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
    """Return the first bytes of a file from one that is not white space; empty without one.

    Raises DataError if they say that the file is of a kind that cannot be read.
    """
    with opened(path) as file:
        head = file.read(CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
        while not head and (more := file.read(CHUNK)):
            head = more.lstrip()
    for start, (found, hint) in UNREADABLE.items():
        if head.startswith(start):
            raise DataError(f"{path} {found}", hint=hint)
    return head[:4]


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


def array_elements(path: Path, opening: str = "", named: str = "array") -> Iterator[tuple[Place, Any]]:
    """Yield the elements of an array, decoded one by one: of that which begins where ``opening`` matches, or the file.

    ``named`` names the array in errors.
    Raises DataError at the first fault: the start of the next element is then unknown.
    """
    with opened(path) as file:
        window = _Window(path, file)
        window.enter(opening or r"\s*\[", named)
        while window.peek() != "]":
            window.element += 1
            place = window.place()
            yield place, window.value()
            if window.peek() == ",":
                window.advance(1)
                if window.peek() != "]":
                    continue
                window.fail("a comma before the end of the array")
            elif window.peek() != "]":
                window.fail("expected ',' or ']' after an element of the array")
        window.advance(1)
        if not opening and not window.at_end():
            window.fail("text after the end of the array")


class _Window:
    """The part of a file that is being decoded; it grows only while one element is longer than the window."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.text, self.at, self.line, self.element, self.ended = "", 0, 1, 0, False
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def grow(self) -> None:
        """Read at least as many bytes as there are undecoded characters, so that repeated decoding stays linear."""
        raw = self.file.read(max(CHUNK, len(self.text) - self.at))
        self.ended = not raw
        try:
            more = self.decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            lines = self.text.count("\n", self.at) + error.object.count(b"\n", 0, error.start)
            place = Place(self.path, self.line + lines)  # the byte may be in an element after this one
            raise data_error(place, None, _not_utf8(error), hint=UTF8) from None
        self.text, self.at = self.text[self.at :] + more, 0

    def advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, self.at + to)
        self.at += to

    def enter(self, opening: str, named: str) -> None:
        """Move behind the match of ``opening``. Raises DataError, with the name of what is missing."""
        pattern = re.compile(opening)
        while (match := pattern.search(self.text, self.at)) is None:
            if self.ended:
                raise data_error(self.place(self.at), None, f"found no {named}", f"Give a file with {named}.")
            self.grow()
        self.advance(match.end() - self.at)

    def peek(self) -> str:
        """Return the next character that is not a space."""
        if self.at_end():
            self.fail("the file ends inside an array: the file is incomplete")
        return self.text[self.at]

    def at_end(self) -> bool:
        """Move to the next character that is not a space; return whether there is none."""
        while True:
            match = SPACE.match(self.text, self.at)
            self.advance(match.end() - self.at if match else 0)
            if self.at < len(self.text) or self.ended:
                return self.at == len(self.text)
            self.grow()

    def value(self) -> Any:
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                if self.ended or not self._may_be_cut(error):
                    self.fail(_not_json(error), getattr(error, "pos", self.at))
            else:
                if end < len(self.text) or self.ended:  # a number at the edge may have more digits
                    self.advance(end - self.at)
                    return value
            self.grow()

    def _may_be_cut(self, error: Exception) -> bool:
        """Return whether the edge of the window may cause the fault: it is near the edge or in an open string."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.pos >= len(self.text) - 16 or error.msg.startswith("Unterminated string")

    def place(self, at: int | None = None) -> Place:
        """Return the place of a character of the window; without ``at``, of the next one."""
        line = self.line + (self.text.count("\n", self.at, at) if at is not None else 0)
        return Place(self.path, line, self.element or None)

    def fail(self, reason: str, at: int | None = None) -> NoReturn:
        """Raise the DataError for a fault at a character of the window."""
        hint = "The rest of the array cannot be read: correct that line, or write one item per line."
        raise data_error(self.place(at), None, reason, hint)


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON: {error.msg}"
    return "invalid JSON: nested too deeply" if isinstance(error, RecursionError) else f"invalid JSON: {error}"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x}; save the file as UTF-8"
