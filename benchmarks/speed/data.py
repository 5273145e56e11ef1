"""Real people and their prompts: MovieLens ratings (short) and product reviews (long, where the data is there)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mta.data.history import Person
from mta.data.readers import read_people
from mta.data.tasks import load_task
from mta.data.tasks.task import Task
from mta.model.base import BaseModel
from mta.system import assets
from mta.training.trainer import Job

BASE = "smollm2-135m-instruct"
BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data" / "lamp3_amazon"
REVIEWS = Path(os.environ.get("MTA_REVIEWS") or BESIDE)
SHOTS = 8


class Absent(Exception):
    """Data or hardware that a row needs is not there; says what."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """People of one kind of text, and the task their items belong to."""

    task: Task
    people: list[Person]

    def jobs(self, base: BaseModel, people: int, shots: int = SHOTS) -> list[Job]:
        """The first ``shots`` items of the first ``people`` people as training examples."""
        chosen = [person for person in self.people if len(person.items) >= shots][:people]
        if len(chosen) < people:
            raise Absent(f"{people} people with {shots} items are wanted, {len(chosen)} are there")
        return [
            Job(f"person-{n}", [base.prompts.example(self.task, item) for item in person.items[:shots]])
            for n, person in enumerate(chosen)
        ]


def short() -> Prompts:
    """MovieLens: about 70 tokens an example."""
    task = load_task("movielens-rating")
    return Prompts(task, read_people(assets.resolve("movielens-100k"), task))


def reviews() -> Prompts:
    """Product reviews, LaMP-like: several hundred tokens an example. Raises Absent where there are none."""
    if not REVIEWS.is_dir():
        raise Absent("no product reviews: MTA_REVIEWS names no folder with LaMP-3's files")
    task = load_task("lamp3")
    return Prompts(task, read_people(REVIEWS, task))
