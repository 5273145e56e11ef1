"""One LoRA on everything that a bank saw: the items behind its task LoRA, its anchors, and its calibration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from mta.bank.bank import Bank
from mta.bank.calibration.people import measured_items
from mta.bank.members import TrainedPart
from mta.bank.task_lora import LOSSES, pooled_candidates, pooled_items
from mta.config import Run, override
from mta.data.history import Person
from mta.tracking.run_folder import sittings


def in_bank(bank: Bank, part: TrainedPart, candidates: Iterable[Person]) -> list[Person]:
    """Return the candidates whom a part of a bank was trained on, with whole histories, in the bank's order."""
    trained = [person for person in candidates if bank.info.members.trained(person.id, part)]
    return sorted(trained, key=lambda person: person.id)


def behind_task_lora(
    bank: Bank, task_people: Sequence[Person], candidates: Sequence[Person], seed: int
) -> list[list[Person]]:
    """Return the people behind a bank's task LoRA and those held out from it, with only these items."""
    if not bank.task_lora:
        return [[], []]
    settings, parts = bank.info.run.task_lora, []
    anchors = {person.id for person in in_bank(bank, "anchor", candidates)}
    others = pooled_candidates(candidates, anchors, settings)
    for items in pooled_items(task_people, settings, seed, candidates=others):
        chosen = set(map(id, items))
        cut = (replace(p, items=tuple(item for item in p.items if id(item) in chosen)) for p in (*task_people, *others))
        parts.append([person for person in cut if person.items])
    return parts


def behind_bank(
    bank: Bank, task_people: Sequence[Person], candidates: Sequence[Person], seed: int
) -> tuple[list[Person], list[Person]]:
    """Return everybody whom a bank saw, once, with the items that it saw; and those held out from its task LoRA.

    Of people who calibrated it, these are all items that they kept back, or the first ones, as many as were measured.
    """
    pool, held_out = behind_task_lora(bank, task_people, candidates, seed)
    run, measured = bank.info.run, in_bank(bank, "calibration", candidates)
    pool += [person.latest(run.bank.max_items) for person in in_bank(bank, "anchor", candidates)]
    counts = [len(shots) + len(queries) for shots, queries in measured_items(measured, run.calibration)]
    kept_back = run.task_lora.kept_back
    pool += [person.first(count if kept_back is None else kept_back) for person, count in zip(measured, counts)]
    items: dict[str, set[int]] = {}
    for person in pool:
        items.setdefault(person.id, set()).update(map(id, person.items))
    known = (person for person in (*task_people, *candidates) if person.id in items)
    return [replace(p, items=tuple(item for item in p.items if id(item) in items[p.id])) for p in known], held_out


def run_on_everything(
    run: Run, pool: Literal["everything", "as-many"], bank: Bank, folder: Path, trained: int, held_out: int
) -> Run:
    """Return a run whose task LoRA is trained on all items of its people. Nothing else of its bank is used.

    ``as-many``: once, for as many examples as the bank in ``folder`` took for its anchors and its task LoRA (with so
    many items ``trained`` on and ``held_out``), in batches of the task LoRA's size.
    """
    words = ["task_lora.enabled=true", f"task_lora.items={10**9}", f"task_lora.per_person={10**9}"]
    words += ["task_lora.unseen=null", "bank.anchors=1", "calibration.enabled=false"]
    if pool == "as-many":
        built = bank.info.run
        # Without held-out items there is one round. A killed and resumed build may not know its rounds: count the most.
        most = built.task_lora.rounds if held_out else 1
        rounds = next((len(one[LOSSES]) for one in reversed(sittings(folder)) if LOSSES in one), most)
        examples = built.task_lora.training.examples(trained) * (rounds if built.task_lora.enabled else 0)
        examples += sum(built.bank.training.examples(items) for items in bank.info.items)
        steps = math.ceil(examples / run.task_lora.training.batch_size)
        words += ["task_lora.rounds=1", f"task_lora.training.steps={steps}"]
    return override(run, words)
