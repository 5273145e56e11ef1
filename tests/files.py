"""Small files of people's items in every format, made on the spot."""

from __future__ import annotations

import fcntl
import json
import os
import random
import string
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mta.data.readers import read_people
from mta.errors import DataError

ASK = (
    "What is the score of the following review on a scale of 1 to 5? "
    "just answer with 1, 2, 3, 4, or 5 without further explanation. review: "
)
TIME = "expected a number or an ISO date such as 2024-05-31"
GOOD = {"person": "ann", "text": "Fine.", "score": "4"}


def folder_of(store: Any, id: str) -> str:
    """Return the name of a person's folder in a store: the keyed hash of their id."""
    return store._path(id, write=True).rpartition("/")[2]


def path_of_open(fd: int) -> str:
    """Return the path of an open file or folder."""
    if sys.platform == "darwin":
        return fcntl.fcntl(fd, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0").decode()
    return os.readlink(f"/proc/self/fd/{fd}")


def path_of(store: Any, id: str) -> Path:
    """Return a person's folder in a local store."""
    name = folder_of(store, id)
    return Path(store.files.at(f"{name[:2]}/{name}"))


def jsonl(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def dumped(path: Path, value: Any, indent: int | None = 0) -> Path:
    path.write_text(json.dumps(value, indent=indent), encoding="utf-8")
    return path


def question(id: str, user: str | None = "u", /, **changes: Any) -> dict[str, Any]:
    profile = [{"id": f"{id}{n}", "text": f"text {n}", "score": "4", "date": f"200{9 - n}"} for n in range(3)]
    row = {"id": id, "input": f"{ASK}Now {id}", "profile": profile, **({"user_id": user} if user else {}), **changes}
    return {key: value for key, value in row.items() if value is not ...}


def lamp(tmp_path: Path, questions: list[Any], golds: Mapping[str, str] | None, name: str = "LaMP_3") -> Path:
    if golds is not None:
        rows = [{"id": id, "output": output} for id, output in golds.items()]
        dumped(tmp_path / "dev_outputs.json", {"task": name, "golds": rows})
    return dumped(tmp_path / "dev_questions.json", questions)


def fails(path: Path, task: str, message: str, hint: str | None = None) -> None:
    with pytest.raises(DataError) as caught:
        read_people(path, task)
    assert caught.value.message == message
    assert hint is None or caught.value.hint == hint


def prose(seed: int, words: int = 20) -> str:
    """A text that nobody writes twice by coincidence."""
    lots = random.Random(seed)
    return " ".join("".join(lots.choices(string.ascii_lowercase, k=6)) for _ in range(words))


def review(seed: int, score: str = "4") -> dict[str, str]:
    return {"text": prose(seed), "score": score}


def shared_data(name: str) -> Path:
    path = Path(__file__).parents[2] / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"no data at {path}")
    return path
