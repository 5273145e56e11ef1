"""Split people into two halves that share no items: one to calibrate a bank on, the other to test it.

    python -m benchmarks.halves data/lamp4_authors/test_100.json --task lamp4 --out halves

``calibrate.jsonl`` has one person of each group that shares items, because calibrations leave shared items out;
``compare.jsonl`` has everybody of the other half. A benchmark's own question with its answer is a person's last item.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from mta.data.history import Person
from mta.data.readers import read_people


def main() -> None:
    """Read, split, and write."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("people", type=Path)
    parse.add_argument("--task", required=True)
    parse.add_argument("--out", type=Path, required=True)
    args = parse.parse_args()
    groups: dict[str, list[Person]] = {}
    for person in read_people(args.people, task=args.task):
        groups.setdefault(person.group or person.id, []).append(person)
    names = sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest())
    half = names[: len(names) // 2]
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "calibrate.jsonl", (members[0] for name, members in groups.items() if name in half))
    write(args.out / "compare.jsonl", (one for name, members in groups.items() if name not in half for one in members))


def write(path: Path, people: Iterable[Person]) -> None:
    """Write every item of people as a line, in the order of time."""
    rows = (
        {"person": person.id, **item.fields, "time": n}
        for person in people
        for n, item in enumerate((*person.items, *person.queries))
    )
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
