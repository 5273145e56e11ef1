"""Terms that adapters add to the output of one layer, for the rows of one batch: joined, and computed in place.

y = W x + b + sum of terms. Terms of one kind are joined on the rank axis, because each term costs one pass over x and
y at any rank. No gradient of a frozen factor is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from mta.kernels.compile import kernels, wide
from mta.kernels.functions import add_low_rank, low_rank_gradients, product
from mta.kernels.linear import is_linear, weight_of


@dataclass(frozen=True, slots=True)
class SharedTerm:
    """One update for all rows; ``gate`` weights its ranks for each row.

    Shapes: a (P, D), b (O, P), gate (B, P) or None. ``is_zero``: all gates are 0, and only their gradient is wanted.
    """

    a: Tensor
    b: Tensor
    gate: Tensor | None = None
    is_zero: bool = False

    @property
    def trained(self) -> bool:
        """Whether a gradient flows into this term."""
        gates = self.gate is not None and self.gate.requires_grad
        return torch.is_grad_enabled() and (gates or self.trains_factors)

    @property
    def trains_factors(self) -> bool:
        """Whether a gradient flows into A or B."""
        return self.a.requires_grad or self.b.requires_grad

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``y`` (B, T, O) plus the update of ``x`` (B, T, D); some models give both as (B * T, ...)."""
        return torch.addmm(_flat(y), _gated(_flat(x) @ self.a.T, self.gate), self.b.T).view_as(y)

    def add_(self, x: Tensor, y: Tensor) -> None:
        """Add the update of ``x`` to ``y`` in place."""
        _flat(y).addmm_(_gated(_flat(x) @ self.a.T, self.gate), self.b.T)

    def pull_(self, dy: Tensor, dx: Tensor) -> None:
        """Add the gradient with respect to x to ``dx``."""
        _flat(dx).addmm_(_gated(_flat(dy) @ self.b, self.gate), self.a)


@dataclass(frozen=True, slots=True)
class RowTerm:
    """Update u for the u-th of U equal blocks of rows. Shapes: a (U, R, D), b (U, O, R)."""

    a: Tensor
    b: Tensor

    @property
    def trained(self) -> bool:
        return torch.is_grad_enabled() and (self.a.requires_grad or self.b.requires_grad)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.bmm(_row_blocks(x, self.a), self.a.mT)
        return torch.baddbmm(_row_blocks(y, self.a), h, self.b.mT).view_as(y)

    def add_(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the update of ``x`` to ``y`` in place; return x @ a.mT."""
        x, y = _row_blocks(x, self.a), _row_blocks(y, self.a)
        h = add_low_rank(y, x, self.a, self.b.mT)
        if h is None:
            h = torch.bmm(x, self.a.mT)
            y.baddbmm_(h, self.b.mT)
        return h

    def pull_(self, dy: Tensor, dx: Tensor) -> None:
        RowTerm(self.b.mT, self.a.mT).add_(dy, dx)

    def gradients(self, dx: Tensor | None, dy: Tensor, x: Tensor, h: Tensor, trained: int) -> tuple[Tensor, Tensor]:
        """Return the gradients of the first ``trained`` ranks of A and B, and add that of x to ``dx``.

        ``h`` is what ``add_`` returned.
        """
        x, dy = _row_blocks(x, self.a), _row_blocks(dy, self.a)
        dx = None if dx is None else _row_blocks(dx, self.a)
        if h.dtype == wide(x.dtype) and kernels("low_rank", x):
            da, db = low_rank_gradients(dx, dy, x, h, self.a, self.b.mT, trained)
            return da, db.mT
        dh = torch.bmm(dy, self.b)
        if dx is not None:
            dx.baddbmm_(dh, self.a)
        # Few rows times many columns: the other way round, or with strided rows, products take longer.
        return torch.bmm(dh[:, :, :trained].mT.contiguous(), x), torch.bmm(h[:, :, :trained].mT.contiguous(), dy).mT

    def laid_out(self) -> RowTerm:
        """Return the term with B in the memory layout of the kernels: rank by rank."""
        return RowTerm(self.a.contiguous(), self.b.mT.contiguous().mT)


Term = SharedTerm | RowTerm


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _gated(h: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return h
    return (h.view(len(gate), -1, h.shape[-1]) * gate[:, None]).flatten(0, 1)


def _row_blocks(x: Tensor, a: Tensor) -> Tensor:
    return x.reshape(a.shape[0], -1, x.shape[-1])


def _input_gradient(dy: Tensor, layer: nn.Linear, frozen: Sequence[Term]) -> Tensor:
    """Return the gradient of x through a frozen layer and frozen terms."""
    dx = product(dy, weight_of(layer).mT)
    for term in frozen:
        term.pull_(dy, dx)
    return dx


class _AdaptedLinear(Function):
    """A frozen linear layer with one trained row term (a, b) and frozen terms; the backward pass recomputes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear, a: Tensor, b: Tensor, frozen: Sequence[Term]) -> Tensor:
        x = x.contiguous()  # the kernels of the backward pass need contiguous rows
        alike = [term for term in frozen if isinstance(term, RowTerm) and len(term.a) == len(a)]
        others = [term for term in frozen if not (isinstance(term, RowTerm) and len(term.a) == len(a))]
        rows = _side_by_side([RowTerm(a, b), *alike])
        rows = (_even(rows) if _is_faster_even(x) else rows).laid_out()
        y = product(x, weight_of(layer), layer.bias)
        for term in others:
            term.add_(x, y)
        h = rows.add_(x, y)
        ctx.save_for_backward(x, rows.a, rows.b, h)
        ctx.layer, ctx.others, ctx.rank = layer, others, a.shape[1]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x, a, b, h = ctx.saved_tensors
        dy = dy.contiguous()
        dx = _input_gradient(dy, ctx.layer, ctx.others) if ctx.needs_input_grad[0] else None
        da, db = RowTerm(a, b).gradients(dx, dy, x, h, ctx.rank)
        return dx, None, da, db, None


class _GatedLinear(Function):
    """A frozen linear layer with one gated term, whose gates (B, P) are trained, and frozen terms.

    The backward pass needs neither x nor y, only x A^T. Where all gates are 0, products that add zeros are left out.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, layer: nn.Linear, own: SharedTerm, frozen: Sequence[Term]) -> Tensor:
        x, y = x.contiguous(), product(x, weight_of(layer), layer.bias)
        h = _flat(x) @ own.a.T
        if not own.is_zero:
            _flat(y).addmm_(_gated(h, gate), own.b.T)
        for term in frozen:
            term.add_(x, y)
        ctx.save_for_backward(h, gate, own.a, own.b)
        ctx.layer, ctx.frozen, ctx.is_zero = layer, frozen, own.is_zero
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        h, gate, a, b = ctx.saved_tensors
        dy = dy.contiguous()
        dh = _flat(dy) @ b
        dgate = (dh * h).view(len(gate), -1, dh.shape[-1]).sum(1)
        if not ctx.needs_input_grad[0]:
            return None, dgate, None, None, None
        dx = _input_gradient(dy, ctx.layer, ctx.frozen)
        if not ctx.is_zero:
            _flat(dx).addmm_(_gated(dh, gate), a)
        return dx, dgate, None, None, None


def joined(terms: Sequence[Term]) -> list[Term]:
    """Return the same sum in as few terms as possible; trained terms are not joined with frozen ones."""
    shared, rows = list[SharedTerm](), list[RowTerm]()
    for trained in (False, True):
        alike = [term for term in terms if term.trained == trained]
        shared += _joined_shared([term for term in alike if isinstance(term, SharedTerm)])
        rows += _joined_rows([term for term in alike if isinstance(term, RowTerm)])
    blocks = {len(term.a) for term in rows}
    if len(blocks) == 1:  # frozen updates without gates cost least in the row term
        movable = [term for term in shared if term.gate is None and not term.trained]
        shared = [term for term in shared if term.gate is not None or term.trained]
        moved = [RowTerm(term.a.expand(*blocks, -1, -1), term.b.expand(*blocks, -1, -1)) for term in movable]
        frozen = [term for term in rows if not term.trained]
        rows = [*_joined_rows([*frozen, *moved]), *(term for term in rows if term.trained)]
    return [*shared, *rows]


def _joined_shared(terms: Sequence[SharedTerm]) -> list[SharedTerm]:
    """Return at most one term; if any term has gates, terms without gates get ones."""
    if len(terms) <= 1 and not any(term.a.is_inference() or term.b.is_inference() for term in terms):
        return list(terms)  # autograd cannot save inference tensors, only their copies
    a, b = torch.cat([term.a for term in terms]), torch.cat([term.b for term in terms], 1)
    gate = next((term.gate for term in terms if term.gate is not None), None)
    if gate is not None:
        gate = torch.cat([gate.new_ones(len(gate), len(t.a)) if t.gate is None else t.gate for t in terms], 1)
    return [SharedTerm(a, b, gate, is_zero=all(term.is_zero for term in terms))]


def _joined_rows(rows: Sequence[RowTerm]) -> list[RowTerm]:
    """Return one term for each number of row blocks."""
    counts = dict.fromkeys(len(term.a) for term in rows)
    return [_side_by_side([term for term in rows if len(term.a) == count]) for count in counts]


def _side_by_side(rows: Sequence[RowTerm]) -> RowTerm:
    if len(rows) == 1:
        return rows[0]
    return RowTerm(torch.cat([term.a for term in rows], 1), torch.cat([term.b.mT for term in rows], 1).mT)


def _is_faster_even(x: Tensor) -> bool:
    return x.is_cuda


def _even(term: RowTerm) -> RowTerm:
    """Return the term with zero ranks, up to a multiple of 8: GPUs multiply odd rows of bfloat16 slowly."""
    if not (more := -term.a.shape[1] % 8):
        return term
    return RowTerm(pad(term.a, (0, 0, 0, more)), pad(term.b, (0, more)))


def with_terms(layer: nn.Module, terms: Sequence[Term]) -> Callable[[Tensor], Tensor]:
    """Return the forward function of ``layer`` plus ``terms``."""
    parts = joined(terms)
    trained = [term for term in parts if term.trained]
    frozen = [term for term in parts if not term.trained]
    own = trained[0] if len(trained) == 1 else None
    if is_linear(layer) and isinstance(own, RowTerm):
        return lambda x: _AdaptedLinear.apply(x, layer, own.a, own.b, frozen)  # type: ignore[no-untyped-call]
    if is_linear(layer) and isinstance(own, SharedTerm) and own.gate is not None and not own.trains_factors:
        return lambda x: _GatedLinear.apply(x, own.gate, layer, own, frozen)  # type: ignore[no-untyped-call]
    if not torch.is_grad_enabled():
        parts = [term.laid_out() if isinstance(term, RowTerm) else term for term in parts]
    return partial(_summed, layer.forward, parts, in_place=not trained)


def _summed(plain: Callable[[Tensor], Tensor], parts: Sequence[Term], x: Tensor, *, in_place: bool) -> Tensor:
    y = plain(x)
    for term in parts:
        if in_place and y.is_contiguous():
            term.add_(x, y)  # safe: y is the layer's new output, and nothing else refers to it
        else:
            y = term(x, y)
    return y
