"""The batched layer: adds the updates of different people to the rows of one batch.

No weight of the model is written. Within a ``with`` block, ``applied`` replaces the ``forward`` of each adapted linear
layer, so that the next layer gets the layer's own output plus the updates of all adapters.

    y[b] = W x[b] + sum over adapters of update(owner[b]) @ x[b]

``owner`` (B,) is the person's number for row b, or -1 for a row without a person, which gets only ``Shared`` adapters.
``owner`` is on the CPU: rows are grouped there, without waiting for a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mta.errors import InputError
from mta.kernels.linear import dtype_of
from mta.lora.batch import LoraBatch
from mta.lora.terms import RowTerm, SharedTerm, Term, with_terms
from mta.system.device import moved

MakeTerm = Callable[[torch.dtype], Term]  # the term of one layer, in the layer's dtype


class Adapters(Protocol):
    """Adapters that can be applied to any batch of rows."""

    def terms(self, owner: Tensor) -> Mapping[str, MakeTerm]:
        """Return a function per adapted layer, by name, that makes the layer's term for ``owner`` (B,), on the CPU."""


@dataclass(frozen=True, slots=True)
class _OfBatch:
    batch: LoraBatch


class Shared(_OfBatch):
    """One adapter for every row: the task LoRA or an anchor. ``batch`` holds exactly one adapter."""

    def terms(self, owner: Tensor) -> Mapping[str, MakeTerm]:
        def term(a: Tensor, b: Tensor, dtype: torch.dtype) -> Term:
            return SharedTerm(a[0].to(dtype), (b[0] * self.batch.scale).to(dtype))

        return {name: partial(term, a, b) for name, (a, b) in self.batch.factors.items()}


@dataclass(frozen=True, slots=True)
class Gated(_OfBatch):
    """N adapters shared by all rows, weighted by coefficients of each row: a merge computed from the bank.

    ((x @ A_bank.T) * w[u]) @ B_bank.T equals the exact merge. A person is N numbers, and no factors are copied.
    Shapes: batch of N adapters; w (U, N), or (U, L, N) with coefficients per adapted layer. Gates of owner -1 are 0.
    ``is_zero``: all of ``w`` are 0, and only the gradient of ``w`` is needed, which costs less.
    """

    w: Tensor
    is_zero: bool = False

    def terms(self, owner: Tensor) -> Mapping[str, MakeTerm]:
        w = self.w[:, None] if self.w.ndim == 2 else self.w
        (owner,) = moved(w.device, owner)
        gates = w[owner] * (owner >= 0)[:, None, None].to(w)
        gates = self.batch.scale * gates.repeat_interleave(self.batch.rank, -1)  # (B, 1 or L, N * R)
        by_layer = gates.expand(-1, len(self.batch.factors), -1).unbind(1)

        def term(a: Tensor, b: Tensor, gate: Tensor, dtype: torch.dtype) -> Term:
            wide_a, wide_b = a.flatten(0, 1).to(dtype), b.transpose(0, 1).flatten(1).to(dtype)
            return SharedTerm(wide_a, wide_b, gate.to(dtype), self.is_zero)

        return {name: partial(term, a, b, gate) for (name, (a, b)), gate in zip(self.batch.factors.items(), by_layer)}


class PerPerson(_OfBatch):
    """Adapter u for the rows of person u: a merge, a stack, or an OPPU LoRA. Rows of owner -1 get no update."""

    def terms(self, owner: Tensor) -> Mapping[str, MakeTerm]:
        people = _to_gather(owner, len(self.batch))
        if people is not None:
            (people,) = moved(self.batch.device, people)

        def term(a: Tensor, b: Tensor, dtype: torch.dtype) -> Term:
            scale: float | Tensor = self.batch.scale
            if people is not None:
                a, b, scale = a[people], b[people], scale * (people >= 0)[:, None, None].to(b)
            return RowTerm(a.to(dtype), (b * scale).to(dtype))  # scale B: it is smaller than the activations

        return {name: partial(term, a, b) for name, (a, b) in self.batch.factors.items()}


@dataclass(frozen=True, slots=True)
class Renumbered:
    """Adapters with renumbered owners: owner i is owner ``numbers[i]`` of ``adapters``; -1 stays -1.

    ``numbers`` are on the CPU.
    """

    adapters: Adapters
    numbers: Tensor

    def terms(self, owner: Tensor) -> Mapping[str, MakeTerm]:
        return self.adapters.terms(torch.where(owner < 0, owner, self.numbers[owner]))


def _to_gather(owner: Tensor, people: int) -> Tensor | None:
    """Return the people whose factors have to be copied: one person for each of equally large blocks of rows.

    None if all people have the same number of rows, in order: then no factor is copied.
    """
    each, rest = divmod(len(owner), people)
    if not rest and torch.equal(owner, torch.arange(people, device=owner.device).repeat_interleave(each)):
        return None
    found, rows = torch.unique_consecutive(owner, return_counts=True)
    return found if bool((rows == rows[0]).all()) else owner  # unequal counts: once per row instead of per person


@contextmanager
def applied(model: nn.Module, adapters: Sequence[Adapters], owner: Tensor) -> Iterator[None]:
    """Apply these adapters to ``model`` within the block, for rows of ``owner`` (B,), which is best on the CPU.

    Other threads wait for the end of the block. Blocks over one model cannot be nested: raises InputError.
    With gradient checkpointing, run the backward pass inside the block too, because it runs the layers again.
    """
    with _turn(model):
        by_layer: dict[str, list[MakeTerm]] = {}
        owner = owner.cpu()
        for adapter in adapters:
            for name, make in adapter.terms(owner).items():
                by_layer.setdefault(name, []).append(make)
        forwards = {}
        for name, makers in by_layer.items():
            layer: Any = model.get_submodule(name)
            # Made before the layer's call: decoding calls a layer once per token, and a checkpointed layer runs twice.
            forwards[layer] = with_terms(layer, [make(dtype_of(layer)) for make in makers])
        with replaced_forwards(forwards):
            yield


@dataclass(slots=True)
class _Turn:
    """Whose turn it is to apply adapters to one model: two threads at once would get each other's adapters."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    thread: int | None = None


_TURNS: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()
_TAKING = threading.Lock()


@contextmanager
def _turn(model: nn.Module) -> Iterator[None]:
    with _TAKING:
        turn = _TURNS.setdefault(model, _Turn())
    if turn.thread == threading.get_ident():
        raise InputError("adapters are applied to this model already", hint="Leave the block that applies them first.")
    with turn.lock:
        turn.thread = threading.get_ident()
        try:
            yield
        finally:
            turn.thread = None


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
