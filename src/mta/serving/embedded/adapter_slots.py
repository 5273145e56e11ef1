"""Adapters of the rows being decoded, kept in place: the row in cache slot n has adapter slot n.

Task LoRA and anchors are shared by all rows; each row weighs them by its gates. The stack, and a merge made by svd or
factor, belong to one row and have room of a fixed rank in its slot. A row that joins or leaves writes one slot; a
forward pass reads a contiguous slice of slots and copies nothing.

    y[b] = W x[b] + sum over ranks of gate[b] * (shared update) + own[b]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mta.bank.bank import Bank
from mta.kernels.functions import AdaptedRows, product
from mta.lora.batch import LoraBatch, shared_ranks
from mta.lora.layers import replaced_forwards
from mta.lora.terms import RowTerm
from mta.model.base import BaseModel
from mta.personalize.adapters import SharedModel, adapter_parts
from mta.store.state import State

_SLICES = 128  # slices of slots with cached forwards, at most
_ALIGNMENT = 32  # the number of shared ranks is padded to a multiple, so that kernels read whole vectors


@dataclass(frozen=True, slots=True)
class RowAdapter:
    """The adapter of one row: gates (P,) of the shared updates, and the row's own LoRA or None."""

    gates: Tensor
    own: LoraBatch | None


class AdapterSlots:
    """Adapter slots for ``count`` rows over base and bank; ``opened`` applies a slice of the slots to the model."""

    def __init__(self, base: BaseModel, bank: Bank, count: int) -> None:
        self.base, self.bank = base, bank
        shared = [batch for batch in (bank.task_lora, bank.device_anchors) if batch is not None]
        self._task_ranks = bank.task_lora.rank if bank.task_lora else 0  # shared ranks, before those of the anchors
        self._ranks = self._task_ranks + len(bank) * bank.anchors.rank  # number of shared ranks; then zero padding
        padding = -self._ranks % _ALIGNMENT
        self._shared: dict[str, tuple[Tensor, Tensor]] = {}  # A (P, D) and B (O, P)
        for name in base.targets:
            a, b = shared_ranks(shared, name)
            a, b = pad(a, (0, 0, 0, padding)), pad(b, (0, padding))
            self._shared[name] = a.to(base.dtype).contiguous(), b.to(base.dtype).contiguous()
        self._gates = torch.zeros(count, self._ranks + padding, dtype=base.dtype, device=base.device)
        self._rank, zeros = 0, self._gates.new_zeros
        self._own = {name: (zeros(count, 0, d), zeros(count, 0, o)) for name, (d, o) in base.targets.items()}
        self._forwards: dict[tuple[int, int], dict[nn.Module, _Adapted]] = {}  # by slice of slots
        self._grow(bank.info.run.stack.lora.rank)

    def adapter_of(self, owner: State | SharedModel, stacked: bool = True) -> RowAdapter:
        """Compute the adapter of a row from bank and state. Raises StateCorrupt, OtherBank."""
        dtype, anchors = self.base.master_dtype, self.bank.anchors
        parts = adapter_parts(owner, anchors, self.bank.hash, dtype, stacked)
        gates = torch.zeros(self._gates.shape[1], dtype=dtype)
        gates[: self._task_ranks] = float(parts.task_lora)
        if parts.gates is not None:
            gates[self._task_ranks : self._ranks] = parts.gates.repeat_interleave(anchors.rank)
        own = parts.stack.scaled_into_b().to(self.base.device, self.base.dtype) if parts.stack else None
        return RowAdapter(gates.to(self._gates), own)

    def take(self, place: int, adapter: RowAdapter) -> None:
        """Write an adapter into slot ``place``; grow all slots if its rank does not fit."""
        if adapter.own and adapter.own.rank > self._rank:
            self._grow(adapter.own.rank)
        self.clear(place)
        self._gates[place] = adapter.gates
        if adapter.own:
            for name, (a, b) in self._own.items():
                own = adapter.own.factors[name]
                a[place, : adapter.own.rank], b[place, : adapter.own.rank] = own.a[0], own.b[0].mT

    def clear(self, place: int) -> None:
        torch._foreach_zero_(self._slot(place))

    def exchange(self, one: int, other: int) -> None:
        """Swap two slots; on a GPU, each of these calls copies many tensors with one launch."""
        ones, others = self._slot(one), self._slot(other)
        between = [torch.empty_like(part) for part in ones]
        for target, source in ((between, ones), (ones, others), (others, between)):
            torch._foreach_copy_(target, source)

    def _slot(self, place: int) -> list[Tensor]:
        """Return what slot ``place`` holds, as views."""
        return [kept[place] for kept in (self._gates, *chain(*self._own.values()))]

    @contextmanager
    def opened(self, rows: slice) -> Iterator[None]:
        """Within the block, row i of a batch through ``base.model`` uses slot ``rows.start + i``."""
        key = rows.start, rows.stop
        if key not in self._forwards:
            if len(self._forwards) > _SLICES:
                self._forwards.clear()
            self._forwards[key] = self._forwards_of(rows)
        with replaced_forwards(self._forwards[key]):
            yield

    def _forwards_of(self, rows: slice) -> dict[nn.Module, _Adapted]:
        """Return each layer's forward for these slots; it reads the slots' values when called."""
        forwards, room = dict[nn.Module, _Adapted](), None
        for name, (a, b) in self._shared.items():
            layer: Any = self.base.model.get_submodule(name)
            gates, own = self._gates[rows], (self._own[name][0][rows], self._own[name][1][rows])
            room = room or AdaptedRows.buffers_for(gates, own)
            linear = type(layer) is nn.Linear
            kernel = AdaptedRows(layer.weight, layer.bias, (a, b), gates, own, room) if linear else None
            parts = a[: self._ranks], b[:, : self._ranks], gates[:, : self._ranks], RowTerm(own[0], own[1].mT)
            forwards[layer] = _Adapted(kernel, layer.forward, *parts)
        return forwards

    def _grow(self, rank: int) -> None:
        """Make room for ``rank`` ranks in every slot; B is stored rank by rank, as the kernels read it."""
        more = 0, 0, 0, rank - self._rank
        grown = {name: (pad(a, more), pad(b, more)) for name, (a, b) in self._own.items()}
        self._own, self._rank = grown, rank  # only now: out of memory above leaves the slots as they were
        self._forwards.clear()


@dataclass(frozen=True, slots=True)
class _Adapted:
    """Forward of a layer for a slice of slots: its output, shared updates times the row's gates, the row's own LoRA.

    ``kernel`` computes one token of each row. Shapes: a (P, D), b (O, P), gates (B, P), all without padding.
    """

    kernel: AdaptedRows | None
    plain: Callable[[Tensor], Tensor]
    a: Tensor
    b: Tensor
    gates: Tensor
    own: RowTerm

    def __call__(self, x: Tensor) -> Tensor:
        """Shapes: x (B, T, D) -> (B, T, O), or both flat as (B * T, ...)."""
        if self.kernel and (computed := self.kernel(x)) is not None:
            return computed.view(*x.shape[:-1], computed.shape[-1])
        y = self.plain(x)
        h = product(x, self.a).view(len(self.gates), -1, len(self.a)).mul_(self.gates[:, None])
        if y.dtype == torch.bfloat16:  # in place: rounds once
            y.view(-1, y.shape[-1]).addmm_(h.flatten(0, 1), self.b.T)
        else:
            y = y.view(*h.shape[:2], -1) + product(h, self.b)
        self.own.add_(x, y)
        return y.view(*x.shape[:-1], y.shape[-1])
