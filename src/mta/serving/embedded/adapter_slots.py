"""Adapters of the rows being decoded, kept in place: whoever takes a slot takes the seat beside it.

What all rows share, the task LoRA and the bank's anchors, is weighed by each row's gates; what is a person's own, the
stack (and a merge made by svd or by factor), has a place of fixed rank in each seat. A row that comes or goes writes
one seat; a pass reads a stretch of seats and copies nothing.

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
from mta.config import MergeSettings
from mta.errors import OtherBank, StateCorrupt
from mta.kernels import AdaptedRows, product
from mta.lora.batch import LoraBatch, join, shared_ranks
from mta.lora.terms import RowTerm
from mta.model.base import BaseModel
from mta.personalize.adapters import BASE, Nobody
from mta.personalize.merge import Merge, merged_factors
from mta.store.state import State

_STRETCHES = 128  # that are remembered
_EVEN = 32  # shared ranks are a multiple of it: whole vectors for the kernels


@dataclass(frozen=True, slots=True)
class Person:
    """One person's part of a row: gates (P,) of the shared updates, and adapters of their own, or none."""

    gates: Tensor
    own: LoraBatch | None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a bank's task LoRA and anchors lie among the shared ranks."""

    bank: Bank
    task: slice
    anchors: slice


class Seats:
    """Seats for a number of rows over one base; ``opened`` puts a stretch of them on the model.

    Of several ``banks``, the first is the one that nobody's rows (the pooled model) belong to; people's rows belong to
    the bank their state was made with. Their ranks lie side by side, so a second one costs as much as the first.
    """

    def __init__(self, base: BaseModel, banks: Sequence[Bank], count: int) -> None:
        self.base = base
        shared = [batch for bank in banks for batch in (bank.task_lora, bank.working) if batch is not None]
        self._places, self._ranks = _laid_out(banks)
        width = -(-self._ranks // _EVEN) * _EVEN
        self._layers: dict[str, Any] = {name: base.model.get_submodule(name) for name in base.targets}
        self._shared = {name: _side_by_side(shared, name, width, base.dtype) for name in base.targets}
        self._gates = torch.zeros(count, width, dtype=base.dtype, device=base.device)
        self._own: dict[str, tuple[Tensor, Tensor]] = {}
        self._forwards: dict[tuple[int, int], dict[str, Any]] = {}  # of stretches of seats that were opened before
        self._grow(banks[0].info.run.stack.lora.rank)

    @property
    def rank(self) -> int:
        """Room for adapters of a row's own."""
        return next(iter(self._own.values()))[0].shape[1]

    def person(self, whose: State | Nobody, stacked: bool = True) -> Person:
        """What a row of theirs needs, computed anew from bank and state. Raises StateCorrupt, OtherBank."""
        place = self._place_of(whose)
        gates = torch.zeros(self._gates.shape[1], dtype=self.base.master_dtype)
        if whose is not BASE:
            gates[place.task] = 1
        if isinstance(whose, Nobody):
            return Person(gates.to(self._gates), None)
        own = [whose.stack] if stacked and whose.stack else []
        if any(not part.isfinite().all() for batch in own for pair in batch.factors.values() for part in pair):
            raise StateCorrupt("a person's stack holds numbers that are not finite", hint="Personalize again.")
        merge = Merge(torch.tensor([whose.anchors]), torch.tensor([whose.w], dtype=self.base.master_dtype))
        anchors = place.bank.anchors
        if whose.mode == "exact":
            gates[place.anchors] = merge.gates(len(anchors))[0].repeat_interleave(anchors.rank)
        else:
            settings = MergeSettings(mode=whose.mode, rank=whose.rank)
            own.append(merged_factors(anchors, merge, settings))
        return Person(gates.to(self._gates), join(own).to(self.base.device, self.base.dtype) if own else None)

    def _place_of(self, whose: State | Nobody) -> _Place:
        if isinstance(whose, Nobody):
            return next(iter(self._places.values()))
        if whose.bank not in self._places:
            raise OtherBank("the person's state was made with another bank", hint="Personalize again: mta personalize")
        return self._places[whose.bank]

    def take(self, place: int, person: Person) -> None:
        """Write one seat."""
        self._gates[place] = person.gates
        if person.own and person.own.rank > self.rank:
            self._grow(person.own.rank)
        for name, (a, b) in self._own.items():
            a[place], b[place] = 0, 0
            if person.own:
                mine = person.own.factors[name]
                a[place, : person.own.rank], b[place, : person.own.rank] = mine.a[0], mine.b[0].mT

    def clear(self, place: int) -> None:
        """Zeros in the place of whoever sat there."""
        for kept in (self._gates, *(factor for factors in self._own.values() for factor in factors)):
            kept[place].zero_()

    def exchange(self, one: int, other: int) -> None:
        """Let two seats change places."""
        pair, crossed = [one, other], [other, one]
        for kept in (self._gates, *(factor for factors in self._own.values() for factor in factors)):
            kept[pair] = kept[crossed]

    @contextmanager
    def opened(self, rows: slice) -> Iterator[None]:
        """Within the block, row i of a batch through ``base.model`` sits in seat ``rows.start + i``."""
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
        """What the layers compute for these seats; it reads the seats as they are when it is called."""
        key = rows.start, rows.stop
        if len(self._forwards) > _STRETCHES:
            self._forwards.clear()
        if key not in self._forwards:
            own = {name: self._own_of(name, rows) for name in self._layers}
            how = self._ranks, self._gates[rows]
            room = AdaptedRows.room_for(how[1], next(iter(own.values())))
            self._forwards[key] = {
                name: _Adapted(layer, layer.forward, self._shared[name], *how, own[name], room)
                for name, layer in self._layers.items()
            }
        return self._forwards[key]

    def _own_of(self, name: str, rows: slice) -> tuple[Tensor, Tensor]:
        a, b = self._own[name]
        return a[rows], b[rows]

    def _grow(self, rank: int) -> None:
        """Room for so many ranks in every seat; B is kept rank by rank, as the kernels read it."""
        count, grown = len(self._gates), dict[str, tuple[Tensor, Tensor]]()
        for name, (d, o) in self.base.targets.items():
            a, b = (self._gates.new_zeros(count, rank, width) for width in (d, o))
            for new, old in zip((a, b), self._own.get(name, ())):
                new[:, : old.shape[1]] = old
            grown[name] = a, b
        self._own, self._forwards = grown, {}  # at once: where memory ends before, seats stay as they are


class _Adapted:
    """What a layer computes for a stretch of seats: what it gives, the shared updates as each row weighs them, its own.

    Of the shared ranks the first ``ranks`` count: beyond them lie the zeros that make whole vectors of them.
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
        self._few = AdaptedRows(layer.weight, layer.bias, shared, gates, own, room) if linear else None
        self._plain, self._shared, self._ranks = plain, shared, ranks
        self._gates, self._own = gates, own

    def __call__(self, x: Tensor) -> Tensor:
        """Shapes: x (B, T, D) -> (B, T, O), or both flat as (B * T, ...)."""
        if self._few and (found := self._few(x)) is not None:
            return found.view(*x.shape[:-1], found.shape[-1])
        y: Tensor = self._plain(x)
        a, b = self._shared[0][: self._ranks], self._shared[1][:, : self._ranks]
        h = product(x, a).view(len(self._gates), -1, self._ranks).mul_(self._gates[:, None, : self._ranks])
        if y.dtype == torch.bfloat16:  # in place, and rounded once
            y.view(-1, y.shape[-1]).addmm_(h.view(-1, self._ranks), b.T)
        else:
            y = y.view(*h.shape[:2], -1) + product(h, b)
        RowTerm(self._own[0], self._own[1].mT).add_(x, y)
        return y.view(*x.shape[:-1], y.shape[-1])


def _laid_out(banks: Sequence[Bank]) -> tuple[dict[str, _Place], int]:
    """Each bank's place by its hash, and how many shared ranks there are: task LoRA and anchors, bank after bank."""
    places, end = dict[str, _Place](), 0
    for bank in banks:
        pooled = bank.task_lora.rank if bank.task_lora else 0
        anchors = slice(end + pooled, end + pooled + len(bank) * bank.anchors.rank)
        places[bank.hash], end = _Place(bank, slice(end, end + pooled), anchors), anchors.stop
    return places, end


def _side_by_side(batches: list[LoraBatch], name: str, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All ranks of all adapters of a layer, and zeros up to ``width``: A (P, D) and B (O, P)."""
    a, b = shared_ranks(batches, name)
    more = width - len(a)
    return (pad(a, (0, 0, 0, more)).to(dtype).contiguous(), pad(b, (0, more)).to(dtype).contiguous())
