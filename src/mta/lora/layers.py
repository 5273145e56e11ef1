"""The batched layer: adds the updates of different people to the rows of one batch.

No weight of the model is written. Within a ``with`` block, ``applied`` replaces the ``forward`` of each adapted linear
layer, so that the next layer gets the layer's own output plus the updates of all adapters.

    y[b] = W x[b] + sum over adapters of update(owner[b]) @ x[b]

``owner`` (B,) is the person's number for row b, or -1 for a row without a person, which gets only ``Shared`` adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mta.lora.batch import LoraBatch
from mta.lora.terms import RowTerm, SharedTerm, Term, with_terms


class Adapters(Protocol):
    """Adapters that can be applied to any batch of rows."""

    @property
    def names(self) -> Sequence[str]:
        """The adapted layers."""

    def term(self, name: str, owner: Tensor, dtype: torch.dtype) -> Term:
        """Return the term of layer ``name`` for rows that belong to ``owner`` (B,)."""


@dataclass(frozen=True, slots=True)
class _OfBatch:
    batch: LoraBatch

    @property
    def names(self) -> Sequence[str]:
        return self.batch.names


class Shared(_OfBatch):
    """One adapter for every row: the task LoRA or an anchor. ``batch`` holds exactly one adapter."""

    def term(self, name: str, owner: Tensor, dtype: torch.dtype) -> Term:
        a, b = self.batch.factors[name]
        return SharedTerm(a[0].to(dtype), (b[0] * self.batch.scale).to(dtype))


@dataclass(frozen=True, slots=True)
class Gated(_OfBatch):
    """N adapters shared by all rows, weighted by coefficients of each row: a merge computed from the bank.

    ((x @ A_bank.T) * w[u]) @ B_bank.T equals the exact merge; a person is N numbers, and no factors are gathered.
    Shapes: batch of N adapters; w (U, N), or (U, L, N) with coefficients per adapted layer. Gates of owner -1 are 0.
    """

    w: Tensor

    def term(self, name: str, owner: Tensor, dtype: torch.dtype) -> Term:
        a, b = self.batch.factors[name]
        w = self.w if self.w.ndim == 2 else self.w[:, self.batch.names.index(name)]
        gate = w[owner] * (owner >= 0)[:, None].to(w)
        gate = self.batch.scale * gate.repeat_interleave(a.shape[1], 1)  # (B, N * R)
        return SharedTerm(a.flatten(0, 1).to(dtype), b.transpose(0, 1).flatten(1).to(dtype), gate.to(dtype))


class PerPerson(_OfBatch):
    """Adapter u for the rows of person u: a merge, a stack, or an OPPU LoRA. Rows of owner -1 get no update."""

    def term(self, name: str, owner: Tensor, dtype: torch.dtype) -> Term:
        a, b = self.batch.factors[name]
        scale: float | Tensor = self.batch.scale
        if not _blocks(owner, a.shape[0]):
            people, rows = torch.unique_consecutive(owner, return_counts=True)
            if not bool((rows == rows[0]).all()):  # unequal counts: gather once per row instead of once per person
                people = owner
            a, b, scale = a[people], b[people], scale * (people >= 0)[:, None, None].to(b)
        return RowTerm(a.to(dtype), (b * scale).to(dtype))  # scale B: it is smaller than the activations


@dataclass(frozen=True, slots=True)
class Renumbered:
    """Adapters with renumbered owners: owner i is owner ``numbers[i]`` of ``adapters``; -1 stays -1."""

    adapters: Adapters
    numbers: Tensor

    @property
    def names(self) -> Sequence[str]:
        return self.adapters.names

    def term(self, name: str, owner: Tensor, dtype: torch.dtype) -> Term:
        return self.adapters.term(name, torch.where(owner < 0, owner, self.numbers[owner]), dtype)


def _blocks(owner: Tensor, people: int) -> bool:
    """Return whether every person has the same number of rows, in order, so that no factor needs to be copied."""
    rows = owner.shape[0]
    return rows % people == 0 and torch.equal(
        owner, torch.arange(people, device=owner.device).repeat_interleave(rows // people)
    )


@contextmanager
def applied(model: nn.Module, adapters: Sequence[Adapters], owner: Tensor) -> Iterator[None]:
    """Apply these adapters to ``model`` within the block, for rows of ``owner`` (B,).

    With gradient checkpointing, run the backward pass inside the block too, because it runs the layers again.
    """
    by_layer: dict[str, list[Adapters]] = {}
    for adapter in adapters:
        for name in adapter.names:
            by_layer.setdefault(name, []).append(adapter)
    forwards = {}
    for name, parts in by_layer.items():
        layer: Any = model.get_submodule(name)
        # Made before the layer's call: decoding calls a layer once per token, and a checkpointed layer runs twice.
        forwards[layer] = with_terms(layer, [part.term(name, owner, layer.weight.dtype) for part in parts])
    with replaced_forwards(forwards):
        yield


@contextmanager
def replaced_forwards(forwards: Mapping[Any, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replace the ``forward`` of layers within the block."""
    before = {layer: vars(layer).get("forward") for layer in forwards}
    try:
        for layer, forward in forwards.items():
            layer.forward = forward
        yield
    finally:
        for layer, own in before.items():
            if own is None:
                del layer.forward
            else:
                layer.forward = own
