"""Stage 0: one LoRA on many people's pooled items. Later stages train over it; it is also a baseline."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from mta.config import TaskLoraSettings
from mta.data.history import Item, Person
from mta.data.tasks.task import Task
from mta.lora.batch import LoraBatch, fresh
from mta.model.base import BaseModel
from mta.system.progress import Step
from mta.training.checkpoint import Checkpoint
from mta.training.plan import plan_cohorts
from mta.training.trainer import Job, train_loras


def pooled_items(people: Sequence[Person], settings: TaskLoraSettings, seed: int) -> list[Item]:
    """Return the pooled items, chosen by hash: at most ``per_person`` of each person, and at most ``items`` in total.

    The choice does not depend on the order of people.
    """

    def draw(person: Person, place: int) -> bytes:
        return hashlib.sha256(f"{seed}/{person.id}/{place}".encode()).digest()

    ranked: list[tuple[int, bytes, Item]] = []
    for person in people:
        draws = sorted((draw(person, place), place) for place in range(len(person.items)))
        ranked += [(turn, drawn, person.items[i]) for turn, (drawn, i) in enumerate(draws[: settings.per_person])]
    # Each person's first item comes before any second item, so that people have similar numbers of items.
    ranked.sort(key=lambda entry: entry[:2])
    return [item for _, _, item in ranked[: settings.items]]


def train_task_lora(
    base: BaseModel,
    task: Task,
    people: Sequence[Person],
    settings: TaskLoraSettings,
    *,
    seed: int,
    memory: int,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> LoraBatch:
    """Train the task LoRA on the pooled items of ``people``: a batch of one.

    Source: arXiv:2511.20072 trains over a task-adapted model; the selection of items is our choice.
    """
    items = pooled_items(people, settings, seed)
    job = Job("task", [base.prompts.example(task, item) for item in items])
    start = fresh(base.targets, settings.lora.rank, settings.lora.scale, seed, ["task"], base.master_dtype)
    plan = plan_cohorts(base, [job], start.tensors(), memory)
    return train_loras(
        base,
        [job],
        start,
        settings.training,
        seed=seed,
        tokens_per_batch=plan.tokens_per_batch,
        checkpoint=checkpoint,
        on_step=on_step,
    )
