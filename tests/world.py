"""Run ``mta`` in this process, and build a small world with it: base, ratings, bank and store."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import save_base

from mta.cli import main
from mta.system.storage import LOCK
from mta_lab.cli import main as lab_main

TASK = ["--task", "movielens-rating"]
FAST = [
    "encoder=base",
    "dtype=float32",
    "max_tokens=400",
    "memory=64MiB",
    "task_lora.items=8",
    "task_lora.lora.rank=2",
    "bank.anchors=2",
    "bank.min_items=3",
    "bank.max_items=4",
    "bank.lora.rank=2",
    "bank.training.epochs=1",
    "calibration.enabled=true",
    "calibration.people=8",
    "calibration.shots=2",
    "calibration.queries=1",
    "merge.k=0",
    "stack.training.steps=2",
]
LAB = "evaluate", "attack", "score", "report"  # verbs of mta-lab
QUESTION = '{"title": "Zorblax", "genres": "Drama"}'
MEMBER, ANN, BOB = "member-03-hoxha", "new-00-quispe", "new-01-quispe"  # in the bank; not in it


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def run(*words) -> Said:
    """Run ``mta``, or ``mta-lab``, with these words in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["mta", *map(str, words)])
        try:
            lab_main() if words[0] in LAB else main()
        except SystemExit as end:
            code = end.code
    return Said(code, out.getvalue(), err.getvalue())


def mta(*words) -> Said:
    """Run ``mta`` and require exit code 0."""
    said = run(*words)
    assert said.code == 0, said.err
    return said


def ratings(prefix, surname, people, items=6):
    """Return rows of people. Each prefix has its own films, because equal histories would connect people."""
    first = 0 if prefix == "new" else 1000
    return [
        {
            "person": f"{prefix}-{n:02}-{surname}",
            "title": f"Zorblax {first + 31 * n + 7 * i}",
            "genres": "Drama",
            "rating": str(1 + (n + i) % 5),
            "time": i,
        }
        for n in range(people)
        for i in range(items)
    ]


def written(path: Path, rows) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return all paths with their content, except a store's lock, which is empty, and a bank's note of forgettings."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != LOCK]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def modes(root: Path) -> dict[str, str]:
    """Return the modes of a folder and of everything in it, by name."""
    found = [root, *(Path(folder, name) for folder, folders, names in os.walk(root) for name in (*folders, *names))]
    return {str(path.relative_to(root.parent)): oct(stat.S_IMODE(path.lstat().st_mode)) for path in found}


def closed(root: Path) -> None:
    """Assert that only the owner can read a folder and its content."""
    found = modes(root)
    assert {name: mode for name, mode in found.items() if int(mode, 8) & 0o077} == {}
    assert len(found) > 1


@contextlib.contextmanager
def built(root: Path) -> Iterator[World]:
    """Yield a world under ``root``, with its own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTA_CACHE", str(root.with_name(f"{root.name}-cache")))
        yield World(root)


class World:
    """A base, two files of ratings, a bank and a store, all made by the command line."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = save_base(root / "base")
        self.members = written(root / "members.jsonl", ratings("member", "hoxha", 18))
        self.new = written(root / "new.jsonl", ratings("new", "quispe", 4))
        self.bank, self.store = root / "bank", root / "people"
        self.settings = [f"base={self.base}", *FAST, *TASK]
        self.at = ["--bank", self.bank, "--store", self.store]
        self.build = ["bank", "build", self.members, *self.settings, "--out", self.bank]
        self.built = mta(*self.build, "--json")
        self.personalized = mta("personalize", self.new, *self.at, "--json")

    def copy(self, folder: Path) -> list:
        """Copy bank and store for a test that changes them. Returns the options for the copies."""
        shutil.copytree(self.bank, folder / "bank")
        shutil.copytree(self.store, folder / "people")
        return ["--bank", folder / "bank", "--store", folder / "people"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with built(tmp_path_factory.mktemp("world")) as made:
        yield made
