"""The survey with statements that no bank has seen.

python -m mta_lab.experiments.new_statements FOLDER

Writes train.jsonl, everybody but the recipe's test people, without the third statement of each of the five traits, and
test.jsonl, the test people: eight known statements, then these five. Then:

mta-lab evaluate survey --data FOLDER/train.jsonl --test FOLDER/test.jsonl --out runs/new queries=5 --exhibit rivals
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mta.data.history import Item
from mta.data.readers.people import read_people
from mta.data.tasks import load_task
from mta.system.survey import STATEMENTS
from mta_lab.experiments.people import draw_splits
from mta_lab.experiments.recipe import load_experiment

NEW = STATEMENTS[2::5]  # five statements for each trait, one after another


def main(folder: Path) -> None:
    """Write both files."""
    people = read_people("survey", "survey")
    splits, _ = draw_splits(load_experiment("survey"), load_task("survey"), people, [])
    tested, lines = set(splits.test), {"train": list[str](), "test": list[str]()}
    for person in people:
        known = [item for item in person.items if item.fields["statement"] not in NEW]
        new = [item for item in person.items if item.fields["statement"] in NEW]
        test = person.id in tested
        lines["test" if test else "train"] += _lines(person.id, [*known[:8], *new] if test else known)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _lines(person: str, items: list[Item]) -> list[str]:
    return [json.dumps({"person": person, **item.fields, "time": time}) for time, item in enumerate(items, 1)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
