"""The batched layer: adds the updates of different people to the rows of one batch.

Nothing is written into the model. ``applied`` hangs a hook on each adapted linear layer for the length of a
``with`` block; the layer's own output plus every adapter's update is what the next layer sees.

    y[b] = W x[b] + sum over adapters of update(owner[b]) @ x[b]

``owner`` (B,) says whose row b is; -1 is nobody, whose row stays with the adapters that ``Shared`` gives everyone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mta.lora.batch import LoraBatch


class Term(Protocol):
    """One adapter at one layer, with the rows of one batch already chosen."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """``y`` (B, T, O) plus the update applied to ``x`` (B, T, D); some models give both as (B * T, ...)."""


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
        return _SharedTerm(a[0].to(dtype), (b[0] * self.batch.scale).to(dtype), None)


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
        return _SharedTerm(a.flatten(0, 1).to(dtype), b.transpose(0, 1).flatten(1).to(dtype), gate.to(dtype))


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
            a, b, scale = a[owner], b[owner], scale * (owner >= 0)[:, None, None].to(b)
        return _RowTerm(a.to(dtype), (b * scale).to(dtype))  # scaled here, where it is small, not on activations


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


@dataclass(frozen=True, slots=True)
class _SharedTerm:
    a: Tensor  # (P, D)
    b: Tensor  # (O, P)
    gate: Tensor | None  # (B, P)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        h = x.reshape(-1, x.shape[-1]) @ self.a.T
        if self.gate is not None:
            h = (h.view(len(self.gate), -1, h.shape[-1]) * self.gate[:, None]).flatten(0, 1)
        return torch.addmm(y.reshape(-1, y.shape[-1]), h, self.b.T).view_as(y)


@dataclass(frozen=True, slots=True)
class _RowTerm:
    a: Tensor  # (U, R, D)
    b: Tensor  # (U, O, R)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        people = self.a.shape[0]
        h = torch.bmm(x.reshape(people, -1, x.shape[-1]), self.a.mT)
        if y.ndim == 3 and people == y.shape[0]:
            return y.baddbmm_(h, self.b.mT)  # y is the layer's own new output: nobody else holds it
        return torch.baddbmm(y.reshape(people, -1, y.shape[-1]), h, self.b.mT).view_as(y)


def _joined(terms: Sequence[Term]) -> list[Term]:
    """The same sum in as few terms as can be: each is a pass over x and y, whatever its rank."""
    shared = [term for term in terms if isinstance(term, _SharedTerm)]
    rows = [term for term in terms if isinstance(term, _RowTerm)]
    people = {term.a.shape[0] for term in rows}
    if len(people) == 1 and all(term.gate is None for term in shared):
        each = (*people, -1, -1)
        rows += [_RowTerm(term.a.expand(each), term.b.expand(each)) for term in shared]
        shared = []
    if len(people) == 1 and len(rows) > 1:
        rows = [_RowTerm(torch.cat([term.a for term in rows], 1), torch.cat([term.b for term in rows], 2))]
    if len(shared) > 1:
        a, b = torch.cat([term.a for term in shared]), torch.cat([term.b for term in shared], 1)
        shared = [_SharedTerm(a, b, _gates(shared))]
    return [*shared, *rows]


def _gates(terms: Sequence[_SharedTerm]) -> Tensor | None:
    """Gates of joined terms, (B, P) side by side; who has none is always open."""
    first = next((term.gate for term in terms if term.gate is not None), None)
    if first is None:
        return None
    return torch.cat([first.new_ones(len(first), len(t.a)) if t.gate is None else t.gate for t in terms], 1)


@contextmanager
def applied(model: nn.Module, adapters: Sequence[Adapters], owner: Tensor) -> Iterator[None]:
    """Within the block, ``model`` computes with these adapters on rows of ``owner`` (B,).

    With gradient checkpointing the backward pass belongs inside the block too: it runs the layers again.
    """
    by_layer: dict[str, list[Adapters]] = {}
    for adapter in adapters:
        for name in adapter.names:
            by_layer.setdefault(name, []).append(adapter)
    handles = []
    for name, parts in by_layer.items():
        layer: Any = model.get_submodule(name)
        # Made here, not in the hook: decoding calls a layer once per token, and a checkpointed layer runs twice.
        terms = _joined([part.term(name, owner, layer.weight.dtype) for part in parts])
        handles.append(layer.register_forward_hook(partial(_add, terms)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(terms: Sequence[Term], _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    for term in terms:
        output = term(args[0], output)
    return output
