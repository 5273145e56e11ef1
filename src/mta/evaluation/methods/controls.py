"""Controls: what remains of a method's gain when it cannot come from the person's own shots. Source: our choice."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import SerializeAsAny

from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.errors import ConfigError, InputError
from mta.evaluation.methods.merged import MergeMethod, MergeThenAdapt
from mta.evaluation.methods.method import Method, OverMethod, answer
from mta.evaluation.protocol import Outcome, TestBatch
from mta.personalize.merge import Merge, merge_adapters


class PopulationMerge(Method):
    """One merge for everybody: the population's best, from the bank's calibration. Nothing is stored per person."""

    method: Literal["population"] = "population"
    name: str = "population merge"

    def fits(self, task: Task, anchors: int, calibrated: bool) -> bool:
        return calibrated

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        calibration, people = batch.bank.calibration, len(batch.people)
        if calibration is None:
            raise ConfigError("the bank has no calibration", hint="Add one:  mta bank calibrate")
        ids = torch.arange(len(batch.bank))[None]
        merge = Merge(ids, calibration.mu[None].to(batch.base.master_dtype))
        adapters = [*batch.bank.task_adapters, *merge_adapters(batch.bank, merge)]
        answers = answer(batch, range(people), adapters, together=True)
        return Outcome(answers, 0.0, 0.0, Merge(ids.expand(people, -1), merge.w.expand(people, -1)))


class OtherPerson(OverMethod):
    """Another person's model: ``over`` learns from the shots of another tested person, always the same one.

    A gain is personal only as far as it exceeds this one. Where prompts show earlier items, these stay the own ones.
    """

    method: Literal["other-person"] = "other-person"
    name: str = "MTA, other person's shots"
    over: SerializeAsAny[Method] = MergeThenAdapt()
    uses_other_people: ClassVar[bool] = True

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        givers = givers_of(batch.people, batch.tested or batch.people)
        people = [replace(one, items=giver.items) for one, giver in zip(batch.people, givers)]
        swapped = TestBatch(batch.context, people, batch.queries, batch.task, batch.retrieve, batch.write_texts)
        places = {person.id: place for place, person in enumerate(batch.people)}
        if isinstance(self.over, MergeMethod) and all(giver.id in places for giver in givers):  # fitted once for both
            batch.merge(batch.merge_settings(self.over.merge), seed)
            rows = [places[giver.id] for giver in givers]
            swapped.merges.update({key: (merge.select(rows), cost) for key, (merge, cost) in batch.merges.items()})
        return self.over.outcome(swapped, seed)


def givers_of(people: Sequence[Person], among: Sequence[Person]) -> list[Person]:
    """Return for each person the next one by hash ``among`` all tested people who shares no items with them.

    ``among`` holds ``people`` too. Raises InputError for a person who shares items with everybody.
    """
    order = sorted(among, key=lambda person: hashlib.sha256(person.id.encode()).digest())
    places = {person.id: place for place, person in enumerate(order)}
    givers = []
    for person in people:
        following = order[places[person.id] + 1 :] + order[: places[person.id]]
        others = (other for other in following if not person.group or other.group != person.group)
        if (giver := next(others, None)) is None:
            raise InputError(
                f"of {len(among)} people one is alone or shares items with all: no other person to take shots from",
                hint="Test more people.",
            )
        givers.append(giver)
    return givers
