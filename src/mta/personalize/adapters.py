"""From states to adapters: for a batch of rows, and for one person as one LoRA.

A row of a batch belongs to a person, to the pooled model, or to the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mta.bank.bank import Bank
from mta.config.constants import SharedModel as SharedModel
from mta.errors import OtherBank
from mta.lora.batch import LoraBatch, concatenate, join
from mta.lora.layers import Adapters, Gated, PerPerson
from mta.model.base import BaseModel
from mta.personalize.merge import Merge, merge_adapters, merge_loras
from mta.store.state import State

BASE, TASK = SharedModel.BASE, SharedModel.TASK
PersonOrModel = str | SharedModel


@dataclass(frozen=True, slots=True)
class AdapterParts:
    """What a row's adapter consists of; an engine arranges the parts as its kernels read them.

    ``gates`` (N,) weighs all anchors; None without a person.
    """

    task_lora: bool
    gates: Tensor | None = None
    stack: LoraBatch | None = None


def adapter_parts(
    owner: State | SharedModel, anchors: LoraBatch, bank_hash: str, dtype: torch.dtype, stacked: bool = True
) -> AdapterParts:
    """Return the parts of one row's adapter, without its stack if not ``stacked``. Raises OtherBank."""
    if isinstance(owner, SharedModel):
        return AdapterParts(task_lora=owner is not BASE)
    check_bank(owner, bank_hash)
    stack = owner.stack if stacked else None
    return AdapterParts(True, stored_merges([owner], dtype).gates(len(anchors))[0], stack)


def check_bank(state: State, bank_hash: str) -> None:
    """Raise OtherBank if a state was made with another bank: its coefficients mean other anchors."""
    if state.bank != bank_hash:
        raise OtherBank(
            f"the person's state was made with bank {state.bank[:8]}…, this bank is {bank_hash[:8]}…",
            hint="Open that bank, or personalize again:  mta personalize",
        )


def row_adapters(
    base: BaseModel, bank: Bank, owners: Sequence[State | SharedModel], stacked: bool = True
) -> list[Adapters]:
    """Return task LoRA, merges, and stacks (only if ``stacked``) for rows that are numbered by ``owners``.

    Rows without a person get no merge and no stack; the base gets no task LoRA either.
    """
    adapters = merge_adapters(bank, stored_merges(owners, base.master_dtype))
    if bank.task_lora:
        on = torch.tensor([[0.0 if one is BASE else 1.0] for one in owners], device=base.device)
        adapters.append(Gated(bank.task_lora, on))
    stacks = [one.stack if isinstance(one, State) else None for one in owners]
    first = next((one for one in stacks if one), None)
    if stacked and first:
        none = first.map(torch.zeros_like)
        adapters.append(PerPerson(concatenate([one or none for one in stacks]).to(base.device)))
    return adapters


def stored_merges(owners: Sequence[State | SharedModel], dtype: torch.dtype) -> Merge:
    """Return the merges of all owners. Coefficients of rows without a person, and beyond a shorter merge, are 0."""
    states = [one if isinstance(one, State) else None for one in owners]
    k = max((len(state.anchors) for state in states if state), default=1)
    ids, w = torch.zeros(len(states), k, dtype=torch.long), torch.zeros(len(states), k, dtype=dtype)
    for i, state in enumerate(states):
        if state:
            ids[i, : len(state.anchors)] = torch.tensor(state.anchors)
            w[i, : len(state.w)] = w.new_tensor(state.w)
    return Merge(ids, w)


def whole_adapter(bank: Bank, state: State, dtype: torch.dtype) -> LoraBatch:
    """Return task LoRA, merge, and stack of one person as one LoRA in float32 on the CPU. Nothing is lost."""
    parts = [part for part in (bank.task_lora, state.stack) if part]
    if any(state.w) or not parts:  # a merge of nothing needs no anchor's factors
        used = [n for n, w in enumerate(state.w) if w] or [0]  # an anchor with coefficient 0 needs no rank
        merge = stored_merges([state], dtype)
        parts = [merge_loras(bank.anchors, Merge(merge.ids[:, used], merge.w[:, used])), *parts]
    return join([part.to(torch.device("cpu"), torch.float32) for part in parts])
