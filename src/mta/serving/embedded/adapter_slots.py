"""Adapters of the rows being decoded, kept in place: the row in cache slot n has adapter slot n.

Task LoRA and anchors are shared by all rows; each row weighs them by its gates. The stack, and a merge made by svd or
factor, belong to one row and have room of a fixed rank in its slot. A row that joins or leaves writes one slot; a
forward pass reads a contiguous slice of slots and copies nothing.

    y[b] = W x[b] + sum over ranks of gate[b] * (shared update) + own[b]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mta.bank.bank import Bank
from mta.errors import OtherBank, StateCorrupt
from mta.kernels import AdaptedRows, product
from mta.lora.batch import LoraBatch, join, shared_ranks
from mta.lora.terms import RowTerm
from mta.model.base import BaseModel
from mta.personalize.adapters import BASE, Nobody, merge_as_lora, merge_of
from mta.store.state import State

_SLICES = 128  # slices of slots with cached forwards, at most
_ALIGNMENT = 32  # the number of shared ranks is padded to a multiple, so that kernels read whole vectors


@dataclass(frozen=True, slots=True)
class RowAdapter:
    """The adapter of one row: gates (P,) of the shared updates, and the row's own LoRA or None."""

    gates: Tensor
    own: LoraBatch | None


@dataclass(frozen=True, slots=True)
class _RankRange:
    """The ranges of a bank's task LoRA and anchors among the shared ranks."""

    bank: Bank
    task: slice
    anchors: slice


class AdapterSlots:
    """Adapter slots for ``count`` rows over one base; ``opened`` applies a slice of the slots to the model.

    Rows without a person (the pooled model) use the first of several ``banks``. A person's row uses the bank that the
    person's state was made with. The banks' ranks are concatenated, so a second bank costs as much as the first.
    """

    def __init__(self, base: BaseModel, banks: Sequence[Bank], count: int) -> None:
        self.base = base
        shared = [batch for bank in banks for batch in (bank.task_lora, bank.working) if batch is not None]
        self._ranges, self._ranks = _rank_ranges(banks)
        width = -(-self._ranks // _ALIGNMENT) * _ALIGNMENT
        self._layers: dict[str, Any] = {name: base.model.get_submodule(name) for name in base.targets}
        self._shared = {name: _concatenated(shared, name, width, base.dtype) for name in base.targets}
        self._gates = torch.zeros(count, width, dtype=base.dtype, device=base.device)
        self._own: dict[str, tuple[Tensor, Tensor]] = {}
        self._forwards: dict[tuple[int, int], dict[str, Any]] = {}  # by slice of slots
        self._grow(banks[0].info.run.stack.lora.rank)

    @property
    def rank(self) -> int:
        """Rank that a row's own LoRA may have without growing the slots."""
        return next(iter(self._own.values()))[0].shape[1]

    def adapter_of(self, owner: State | Nobody, stacked: bool = True) -> RowAdapter:
        """Compute the adapter of a row from bank and state. Raises StateCorrupt, OtherBank."""
        ranks = self._ranks_of(owner)
        gates = torch.zeros(self._gates.shape[1], dtype=self.base.master_dtype)
        if owner is not BASE:
            gates[ranks.task] = 1
        if isinstance(owner, Nobody):
            return RowAdapter(gates.to(self._gates), None)
        own = [owner.stack] if stacked and owner.stack else []
        if any(not part.isfinite().all() for batch in own for pair in batch.factors.values() for part in pair):
            raise StateCorrupt("a person's stack contains NaN or infinity", hint="Personalize again.")
        anchors, dtype = ranks.bank.anchors, self.base.master_dtype
        if owner.mode == "exact":
            gates[ranks.anchors] = merge_of([owner], dtype).gates(len(anchors))[0].repeat_interleave(anchors.rank)
        else:
            own.append(merge_as_lora(anchors, owner, dtype))
        return RowAdapter(gates.to(self._gates), join(own).to(self.base.device, self.base.dtype) if own else None)

    def _ranks_of(self, owner: State | Nobody) -> _RankRange:
        if isinstance(owner, Nobody):
            return next(iter(self._ranges.values()))
        if owner.bank not in self._ranges:
            raise OtherBank("the person's state was made with another bank", hint="Personalize again: mta personalize")
        return self._ranges[owner.bank]

    def take(self, place: int, adapter: RowAdapter) -> None:
        """Write an adapter into slot ``place``; grow all slots if its rank does not fit."""
        self._gates[place] = adapter.gates
        if adapter.own and adapter.own.rank > self.rank:
            self._grow(adapter.own.rank)
        for name, (a, b) in self._own.items():
            a[place], b[place] = 0, 0
            if adapter.own:
                own = adapter.own.factors[name]
                a[place, : adapter.own.rank], b[place, : adapter.own.rank] = own.a[0], own.b[0].mT

    def clear(self, place: int) -> None:
        """Fill slot ``place`` with zeros."""
        for kept in (self._gates, *(factor for factors in self._own.values() for factor in factors)):
            kept[place].zero_()

    def exchange(self, one: int, other: int) -> None:
        """Swap two slots."""
        pair, crossed = [one, other], [other, one]
        for kept in (self._gates, *(factor for factors in self._own.values() for factor in factors)):
            kept[pair] = kept[crossed]

    @contextmanager
    def opened(self, rows: slice) -> Iterator[None]:
        """Within the block, row i of a batch through ``base.model`` uses slot ``rows.start + i``."""
        before = {name: vars(layer).get("forward") for name, layer in self._layers.items()}
        forwards = self._forwards_of(rows)
        try:
            for name, layer in self._layers.items():
                layer.forward = forwards[name]
            yield
        finally:
            for name, layer in self._layers.items():
                if before[name] is None:
                    del layer.forward
                else:
                    layer.forward = before[name]

    def _forwards_of(self, rows: slice) -> dict[str, Any]:
        """Return each layer's forward for these slots; it reads the slots' values when called."""
        key = rows.start, rows.stop
        if len(self._forwards) > _SLICES:
            self._forwards.clear()
        if key not in self._forwards:
            own = {name: self._own_of(name, rows) for name in self._layers}
            gates = self._gates[rows]
            room = AdaptedRows.buffers_for(gates, next(iter(own.values())))
            self._forwards[key] = {
                name: _Adapted(layer, layer.forward, self._shared[name], self._ranks, gates, own[name], room)
                for name, layer in self._layers.items()
            }
        return self._forwards[key]

    def _own_of(self, name: str, rows: slice) -> tuple[Tensor, Tensor]:
        a, b = self._own[name]
        return a[rows], b[rows]

    def _grow(self, rank: int) -> None:
        """Make room for ``rank`` ranks in every slot; B is stored rank by rank, as the kernels read it."""
        count, grown = len(self._gates), dict[str, tuple[Tensor, Tensor]]()
        for name, (d, o) in self.base.targets.items():
            a, b = (self._gates.new_zeros(count, rank, width) for width in (d, o))
            for new, old in zip((a, b), self._own.get(name, ())):
                new[:, : old.shape[1]] = old
            grown[name] = a, b
        self._own, self._forwards = grown, {}  # only now: out of memory above leaves the slots as they were


class _Adapted:
    """Forward of a layer for a slice of slots: its output, shared updates times the row's gates, the row's own LoRA.

    Only the first ``ranks`` shared ranks count; the rest is zero padding.
    """

    def __init__(
        self,
        layer: Any,
        plain: Any,
        shared: tuple[Tensor, Tensor],
        ranks: int,
        gates: Tensor,
        own: tuple[Tensor, Tensor],
        room: tuple[Tensor, Tensor],
    ) -> None:
        linear = type(layer) is nn.Linear
        self._kernel = AdaptedRows(layer.weight, layer.bias, shared, gates, own, room) if linear else None
        self._plain, self._shared, self._ranks = plain, shared, ranks
        self._gates, self._own = gates, own

    def __call__(self, x: Tensor) -> Tensor:
        """Shapes: x (B, T, D) -> (B, T, O), or both flat as (B * T, ...)."""
        if self._kernel and (found := self._kernel(x)) is not None:
            return found.view(*x.shape[:-1], found.shape[-1])
        y: Tensor = self._plain(x)
        a, b = self._shared[0][: self._ranks], self._shared[1][:, : self._ranks]
        h = product(x, a).view(len(self._gates), -1, self._ranks).mul_(self._gates[:, None, : self._ranks])
        if y.dtype == torch.bfloat16:  # in place: rounds once
            y.view(-1, y.shape[-1]).addmm_(h.view(-1, self._ranks), b.T)
        else:
            y = y.view(*h.shape[:2], -1) + product(h, b)
        RowTerm(self._own[0], self._own[1].mT).add_(x, y)
        return y.view(*x.shape[:-1], y.shape[-1])


def _rank_ranges(banks: Sequence[Bank]) -> tuple[dict[str, _RankRange], int]:
    """Return each bank's ranges by its hash, and the number of shared ranks. Each bank: task LoRA, then anchors."""
    ranges, end = dict[str, _RankRange](), 0
    for bank in banks:
        pooled = bank.task_lora.rank if bank.task_lora else 0
        anchors = slice(end + pooled, end + pooled + len(bank) * bank.anchors.rank)
        ranges[bank.hash], end = _RankRange(bank, slice(end, end + pooled), anchors), anchors.stop
    return ranges, end


def _concatenated(batches: list[LoraBatch], name: str, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Concatenate all ranks of a layer and pad with zeros to ``width``: A (P, D) and B (O, P)."""
    a, b = shared_ranks(batches, name)
    padding = width - len(a)
    return (pad(a, (0, 0, 0, padding)).to(dtype).contiguous(), pad(b, (0, padding)).to(dtype).contiguous())
