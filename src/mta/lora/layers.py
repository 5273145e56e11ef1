"""The batched layer: adds the updates of different people to the rows of one batch.

No weight of the model is written. ``applied`` gives each adapted linear layer another ``forward`` for the length of a
``with`` block: the layer's own output plus every adapter's update is what the next layer sees.

    y[b] = W x[b] + sum over adapters of update(owner[b]) @ x[b]

``owner`` (B,) says whose row b is; -1 is nobody, whose row stays with the adapters that ``Shared`` gives everyone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mta.lora.batch import LoraBatch
from mta.lora.terms import RowTerm, SharedTerm, Term, with_terms


class Adapters(Protocol):
    """Adapters that can be put on any batch of rows."""

    @property
    def names(self) -> Sequence[str]:
        """The layers that get a term."""

    def term(self, name: str, owner: Tensor, dtype: torch.dtype) -> Term:
        """The term of layer ``name`` for rows that belong to ``owner`` (B,)."""


@dataclass(frozen=True, slots=True)
class Shared:
    """One adapter for every row: the task LoRA, or an anchor's. ``batch`` holds exactly one adapter."""

    batch: LoraBatch

    @property
    def names(self) -> Sequence[str]:
        return self.batch.names

    def term(self, name: str, owner: Tensor, dtype: torch.dtype) -> Term:
        a, b = self.batch.factors[name]
        return SharedTerm(a[0].to(dtype), (b[0] * self.batch.scale).to(dtype))


@dataclass(frozen=True, slots=True)
class Gated:
    """N adapters shared by all rows, each row weighing them by its own coefficients: a merge straight from the bank.

    ((x @ A_bank.T) * w[u]) @ B_bank.T equals the exact merge; a person is N numbers and nothing is gathered.
    Shapes: batch of N adapters; w (U, N), or (U, L, N) with coefficients per adapted layer. Nobody's gate is 0.
    """

    batch: LoraBatch
    w: Tensor

    @property
    def names(self) -> Sequence[str]:
        return self.batch.names

    def term(self, name: str, owner: Tensor, dtype: torch.dtype) -> Term:
        a, b = self.batch.factors[name]
        w = self.w if self.w.ndim == 2 else self.w[:, self.batch.names.index(name)]
        gate = w[owner] * (owner >= 0)[:, None].to(w)
        gate = self.batch.scale * gate.repeat_interleave(a.shape[1], 1)  # (B, N * R)
        return SharedTerm(a.flatten(0, 1).to(dtype), b.transpose(0, 1).flatten(1).to(dtype), gate.to(dtype))


@dataclass(frozen=True, slots=True)
class PerPerson:
    """Adapter u for the rows of person u: a merge, a stack, or an OPPU LoRA. Nobody's update is 0."""

    batch: LoraBatch

    @property
    def names(self) -> Sequence[str]:
        return self.batch.names

    def term(self, name: str, owner: Tensor, dtype: torch.dtype) -> Term:
        a, b = self.batch.factors[name]
        scale: float | Tensor = self.batch.scale
        if not _blocks(owner, a.shape[0]):
            whose, rows = torch.unique_consecutive(owner, return_counts=True)
            if not bool((rows == rows[0]).all()):  # else once for all rows of a person
                whose = owner
            a, b, scale = a[whose], b[whose], scale * (whose >= 0)[:, None, None].to(b)
        return RowTerm(a.to(dtype), (b * scale).to(dtype))  # scaled here, where it is small, not on activations


@dataclass(frozen=True, slots=True)
class Renumbered:
    """Adapters for rows whose owners go by other numbers: owner i here is ``numbers[i]`` there; nobody stays nobody."""

    adapters: Adapters
    numbers: Tensor

    @property
    def names(self) -> Sequence[str]:
        return self.adapters.names

    def term(self, name: str, owner: Tensor, dtype: torch.dtype) -> Term:
        return self.adapters.term(name, torch.where(owner < 0, owner, self.numbers[owner]), dtype)


def _blocks(owner: Tensor, people: int) -> bool:
    """Whether every person has the same number of rows, in order: then no factor needs to be copied."""
    rows = owner.shape[0]
    return rows % people == 0 and torch.equal(
        owner, torch.arange(people, device=owner.device).repeat_interleave(rows // people)
    )


@contextmanager
def applied(model: nn.Module, adapters: Sequence[Adapters], owner: Tensor) -> Iterator[None]:
    """Within the block, ``model`` computes with these adapters on rows of ``owner`` (B,).

    With gradient checkpointing the backward pass belongs inside the block too: it runs the layers again.
    """
    by_layer: dict[str, list[Adapters]] = {}
    for adapter in adapters:
        for name in adapter.names:
            by_layer.setdefault(name, []).append(adapter)
    changed = []
    try:
        for name, parts in by_layer.items():
            layer: Any = model.get_submodule(name)
            # Made here, not in the layer's call: decoding calls it once per token, and a checkpointed layer runs twice.
            forward = with_terms(layer, [part.term(name, owner, layer.weight.dtype) for part in parts])
            changed.append((layer, vars(layer).get("forward")))
            layer.forward = forward
        yield
    finally:
        for layer, before in reversed(changed):
            if before is None:
                del layer.forward
            else:
                layer.forward = before
