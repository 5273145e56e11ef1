"""Whose a row is: a person, the pooled model, or the untouched base; and what is added to the base for it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch

from mta.bank.bank import Bank
from mta.config import MergeSettings
from mta.lora.batch import stack
from mta.lora.layers import Adapters, Gated, PerPerson
from mta.model.base import BaseModel
from mta.personalize.merge import Merge, merged
from mta.store.state import State


class Nobody(Enum):
    """Rows that belong to no person: the untouched base, or the pooled model (base and task LoRA)."""

    BASE = "base"
    TASK = "task"


BASE, TASK = Nobody.BASE, Nobody.TASK
Who = str | Nobody


def row_adapters(base: BaseModel, bank: Bank, whose: Sequence[State | Nobody], stacked: bool = True) -> list[Adapters]:
    """Task LoRA, merges and stacks for rows whose owners are numbers into ``whose``.

    A merge is computed the way its stack was trained over. ``stacked=False`` leaves the stacks out. Nobody gets no
    merge and no stack; the base gets no task LoRA either.
    """
    adapters: list[Adapters] = []
    for mode, rank in sorted({(who.mode, who.rank) for who in whose if isinstance(who, State)}, key=str):
        alike = [who if isinstance(who, State) and (who.mode, who.rank) == (mode, rank) else TASK for who in whose]
        adapters.append(merged(bank, merge_of(base, alike), MergeSettings(mode=mode, rank=rank)))
    if bank.task_lora:
        pooled = torch.tensor([[0.0 if who is BASE else 1.0] for who in whose], device=base.device)
        adapters.append(Gated(bank.task_lora, pooled))
    stacks = [who.stack if isinstance(who, State) else None for who in whose]
    first = next((one for one in stacks if one), None)
    if stacked and first:
        none = first.map(torch.zeros_like)
        adapters.append(PerPerson(stack([one or none for one in stacks]).to(base.device)))
    return adapters


def merge_of(base: BaseModel, whose: Sequence[State | Nobody]) -> Merge:
    """Coefficients side by side: nobody's are 0, and shorter merges are filled up with 0."""
    states = [who if isinstance(who, State) else None for who in whose]
    k = max((len(state.anchors) for state in states if state), default=1)
    ids, w = torch.zeros(len(states), k, dtype=torch.long), torch.zeros(len(states), k, dtype=base.master_dtype)
    for i, state in enumerate(states):
        if state:
            ids[i, : len(state.anchors)] = torch.tensor(state.anchors)
            w[i, : len(state.w)] = w.new_tensor(state.w)
    return Merge(ids, w)
