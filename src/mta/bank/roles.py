"""Who trains which part of a bank, and who calibrates it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mta.bank.anchors import choose_anchors
from mta.bank.calibration.people import calibration_people
from mta.bank.context import BuildContext
from mta.bank.members import Members
from mta.bank.task_lora import pooled_candidates
from mta.config import Run
from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class Roles:
    """The people of a bank by what they do. ``chosen`` are the places of the anchors in ``eligible``."""

    task_people: list[Person]  # they train the task LoRA with all their items
    pooled_candidates: list[Person]  # candidates who train it, too, with the items that may
    held_out: list[Person]
    eligible: list[Person]  # candidates with enough items for an anchor
    vectors: Tensor  # of ``eligible``, (U, E)
    chosen: list[int]
    calibrating: list[Person]
    keeping_back: list[Person]  # candidates who keep items back, with these alone

    @property
    def anchors(self) -> list[Person]:
        """The anchors with their whole histories."""
        return [self.eligible[i] for i in self.chosen]

    def members(self, secret: str) -> Members:
        """Return the members of the bank; ``secret`` makes their key."""
        pooled = [*self.task_people, *self.pooled_candidates, *self.held_out]
        groups = pooled, self.eligible, self.anchors, self.calibrating
        task, eligible, anchors, calibrating = ([person.id for person in group] for group in groups)
        return Members.of(secret, task, eligible, anchors, calibrating, self.keeping_back)


def choose_roles(context: BuildContext) -> Roles:
    """Choose the anchors among the candidates, and what everybody else does.

    Raises InputError if there are too few candidates, ConfigError if they keep too few items back.
    """
    task, run, candidates = context.task, context.run, context.candidates
    eligible, vectors, chosen = choose_anchors(task, context.encoder, candidates, run.bank, run.seed, context.on_step)
    anchors, kept_back = {eligible[i].id for i in chosen}, run.task_lora.kept_back
    pool = [*context.task_people] if run.task_lora.enabled else []
    if kept_back is not None:  # candidates with too few items for an anchor train like task people
        pool += [person for person in candidates if len(person.items) < run.bank.min_items]
    others = [person for person in eligible if person.id not in anchors]
    return Roles(
        task_people=pool,
        pooled_candidates=pooled_candidates(eligible, anchors, run.task_lora),
        held_out=[*context.held_out],
        eligible=eligible,
        vectors=vectors,
        chosen=chosen,
        calibrating=_calibrating(task, eligible, [*pool, *context.held_out], anchors, run),
        keeping_back=[] if kept_back is None else [person.first(kept_back) for person in others],
    )


def _calibrating(
    task: Task, candidates: Sequence[Person], task_people: Sequence[Person], anchors: set[str], run: Run
) -> list[Person]:
    """Return the candidates to calibrate on, who are no ``anchors`` (ids); none if calibration is off."""
    settings, kept_back = run.calibration, run.task_lora.kept_back
    if not settings.enabled:
        return []
    if kept_back is not None and kept_back < (needed := settings.shots + settings.queries):
        raise ConfigError(
            f"candidates keep {kept_back} items back; {settings.shots} shots and {settings.queries} queries are needed",
            hint=f"Set task_lora.unseen={needed}, or lower calibration.shots.",
        )
    unseen = {} if kept_back is None else {person.id: kept_back for person in candidates}
    members = anchors | {person.id for person in task_people}
    return calibration_people([*candidates, *task_people], members, settings, run.seed, task, unseen)
