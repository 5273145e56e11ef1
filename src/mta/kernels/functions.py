"""The kernels as functions with gradients: drop-in replacements for a few torch expressions.

Frozen weights, angles, and masks get no gradient. Sums are in float32, or in float64 for float64. Callers check first
that the kernels exist (``mta.kernels.compile.kernels``), except for ``product`` and ``AdaptedRows``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mta.kernels.compile import call, kernels, wide
from mta.system.device import cpuinfo

_ROWS = 24  # of AdaptedRows, at most


class RmsNorm(Function):
    """x (..., D) * weight (D,) / sqrt(mean of x squared + eps)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        d = x.shape[-1]
        y, scale = torch.empty_like(x), x.new_empty(x.numel() // d, dtype=wide(x.dtype))
        call("norm", x.dtype, "rms_norm", (y, scale, x, weight), len(scale), d, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        call("norm", x.dtype, "rms_norm_backward", (dx, dy, scale, x, weight), len(scale), x.shape[-1])
        return dx, None, None


class Rotate(Function):
    """Rotary positions: x (B, H, T, E) * cos + (-second half, first half) * sin, with cos, sin (B or 1, T, E)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, sin, inverse=True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    x = x.transpose(1, 2).contiguous()  # (B, T, H, E), as the linear layer wrote it
    y = torch.empty_like(x)
    call("rotate", x.dtype, "rotate", (y, x, cos, sin), *x.shape, len(cos), inverse)
    return y.transpose(1, 2)


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    """Add x (U, M, D) @ a.mT @ b to y (U, M, O) in place, with a (U, R, D), b (U, R, O); return h = x @ a.mT.

    h (U, M, R) has the dtype of sums. Returns None and changes nothing if there is no kernel for these tensors, or if
    autograd would have to know of the change. ``low_rank_gradients`` computes the gradients.
    """
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        return None
    tokens, low = _few_and_low()
    few = x.dtype != torch.bfloat16 or x.shape[1] <= tokens or a.shape[1] <= low
    contiguous = y.is_contiguous() and x.is_contiguous() and a.is_contiguous() and b.is_contiguous()
    if not (few and contiguous and kernels("low_rank", y, x, a, b)):
        return None
    people, rows, d = x.shape
    h = x.new_empty(people, rows, a.shape[1], dtype=wide(x.dtype))
    call("low_rank", x.dtype, "low_rank", (y, h, x, a, b), people, rows, a.shape[1], d, y.shape[2])
    return h


@cache
def _few_and_low() -> tuple[int, int]:
    """Return the tokens of a person and the ranks beyond which oneDNN's products are faster in bfloat16.

    Measured with and without a matrix unit (docs/decisions/025-speed-diary.md).
    """
    return (32, 4) if "amx_bf16" in cpuinfo("flags").split() else (4, 16)


def low_rank_gradients(
    dx: Tensor | None, dy: Tensor, x: Tensor, h: Tensor, a: Tensor, b: Tensor, trained: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the first ``trained`` ranks of a and b, and add the gradient of x to ``dx`` in place.

    All tensors are contiguous. Shapes as in ``add_low_rank``, which returned ``h``; dx as x, and dy as y.
    """
    people, rows, ranks = h.shape
    da, db = a.new_empty(people, trained, a.shape[2]), b.new_empty(people, trained, b.shape[2])
    dh = torch.empty_like(h)
    tensors, sizes = (dx, da, db, dh, dy, x, h, a, b), (people, rows, ranks, a.shape[2], b.shape[2], trained)
    call("low_rank", x.dtype, "low_rank_backward", tensors, *sizes)
    return da, db


class TreeAttention(Function):
    """Attention in G blocks of Q queries and K keys; ``mta.model.tree_attention`` computes the indices.

    Shapes: q (B, H, T, E), k (B, H / share, T, E), v (B, H / share, T, V), mask (G, 1, Q, K) -> (B, T, H, V).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, blocks: Any, scale: float) -> Tensor:
        batch, heads, tokens, width = *q.shape[:3], v.shape[3]
        groups, count = k.shape[1], len(blocks.queries)
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # (B, T, H, …), mostly without a copy
        spread = _spread(q, blocks)  # (G, H, Q, E)
        near, values = _gathered(k, blocks), _gathered(v, blocks)
        shares = torch.bmm(_grouped(spread, groups), near.flatten(0, 1).mT)  # scores; softmax replaces them in place
        call("attention", q.dtype, "softmax", (shares, mask), count, heads, spread.shape[2], near.shape[2], scale)
        seen = torch.bmm(shares, values.flatten(0, 1))
        ctx.save_for_backward(spread, near, values, shares)
        ctx.blocks, ctx.scale, ctx.shape = blocks, scale, (batch, tokens, heads, width)
        return _summed(seen.view(*spread.shape[:3], width), blocks.place, blocks.each).view(ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        spread, near, values, shares = ctx.saved_tensors
        blocks, groups = ctx.blocks, near.shape[1]
        up = _grouped(_spread(dy.contiguous(), blocks), groups)
        dvalues = torch.bmm(shares.mT, up).view(values.shape)
        dscores = torch.bmm(up, values.flatten(0, 1).mT)
        rows, keys = dscores.shape[0] * dscores.shape[1], dscores.shape[2]
        call("attention", shares.dtype, "softmax_backward", (dscores, shares), rows, keys, ctx.scale)
        dq = torch.bmm(dscores, near.flatten(0, 1)).view(spread.shape)
        dk = torch.bmm(dscores.mT, _grouped(spread, groups)).view(near.shape)
        of_keys = (_summed(part, blocks.slots, blocks.starts) for part in (dk, dvalues))
        parts = _summed(dq, blocks.place, blocks.each), *of_keys
        dq, dk, dv = (part.view(*ctx.shape[:2], *part.shape[1:]).transpose(1, 2) for part in parts)
        return dq, dk, dv, None, None, None


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(G, H, Q, E) -> (G * groups, share * Q, E); heads that share keys are adjacent."""
    return x.view(x.shape[0] * groups, -1, x.shape[3])


def _spread(x: Tensor, blocks: Any) -> Tensor:
    """(B, T, H, E) -> (G, H, Q, E), 0 for places of a block without a token."""
    count, wide_ = blocks.queries.shape
    heads, width = x.shape[2:]
    out = x.new_empty(count, heads, wide_, width)
    call("attention", x.dtype, "spread", (out, x, blocks.place), len(blocks.place), count, wide_, heads, width)
    return out


def _gathered(x: Tensor, blocks: Any) -> Tensor:
    """(B, T, H, E) -> (G, H, K, E) of the keys of each block."""
    count, deep = blocks.keys.shape
    heads, width = x.shape[2:]
    out = x.new_empty(count, heads, deep, width)
    call("attention", x.dtype, "gather", (out, x, blocks.keys), count, deep, heads, width)
    return out


def _summed(x: Tensor, slots: Tensor, starts: Tensor) -> Tensor:
    """(G, H, n, E) -> (B * T, H, E), summed over each token's slots."""
    heads, n, width = x.shape[1:]
    out = x.new_empty(len(starts) - 1, heads, width)
    call("attention", x.dtype, "scatter", (out, x, slots, starts), len(out), n, heads, width)
    return out


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``torch.nn.functional.linear`` without a gradient, for x (..., D) and weight (O, D) of any strides."""
    parts = (x, weight) if bias is None else (x, weight, bias)
    if x.dtype == torch.float32 and _onednn_is_faster() and kernels("onednn", *parts) is not None:
        return _onednn(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


class AdaptedRows:
    """A linear layer with updates for one token of each of a few rows; reads all weights from memory once.

    y = x W^T + bias + (gate * (x A^T)) B^T + (x p^T) q. Shapes: x (M, 1, D), shared A (P, D) and B (O, P),
    gates (M, P), own p (M, S, D) and q (M, S, O) -> (M, 1, O). Called with x only, at every layer of every token: the
    addresses of all other tensors are looked up once. ``buffers`` come from ``buffers_for``; layers may share them.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        shared: tuple[Tensor, Tensor],
        gates: Tensor,
        own: tuple[Tensor, Tensor],
        buffers: tuple[Tensor, Tensor],
    ) -> None:
        rows, (a, b), (p, q) = len(gates), shared, own
        parts = [weight, a, b, gates, p, q, *([] if bias is None else [bias])]
        fits = rows <= _ROWS and all(part.is_contiguous() for part in parts)
        table = kernels("adapted_rows", *parts) if fits else None
        self._run = table["adapted_rows"] if table else None
        self._kept = [part.detach() for part in (*parts, *buffers)]  # keeps the memory behind the addresses alive
        self._between = tuple(part.data_ptr() for part in buffers)
        self._after = *(None if t is None else t.data_ptr() for t in (weight, bias, a, b, gates, p, q)), rows
        self._after += len(a), p.shape[1], *weight.shape[::-1]
        self._dtype, self._numbers, self._shape = weight.dtype, rows * weight.shape[1], (rows, 1, len(weight))

    @staticmethod
    def buffers_for(gates: Tensor, own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return buffers for x A^T and x p^T between two products."""
        return torch.empty_like(gates), gates.new_empty(own[0].shape[:2], dtype=wide(gates.dtype))

    def __call__(self, x: Tensor) -> Tensor | None:
        """Return y; None if there is no kernel for these tensors, or x has more than one token per row."""
        if self._run is None or x.dtype != self._dtype or x.numel() != self._numbers:
            return None
        x, y = x.contiguous(), x.new_empty(self._shape)
        self._run(y.data_ptr(), *self._between, x.data_ptr(), *self._after)
        return y


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def _onednn_is_faster() -> bool:
    """Return whether MKL uses half of this processor's vector width, and oneDNN computes the same results.

    torch multiplies float32 with MKL. Nothing is timed: the libraries round differently, and all workers on one type of
    processor must compute the same bytes.
    """
    half = "avx512f" in cpuinfo("flags").split() and cpuinfo("vendor_id") != "GenuineIntel"
    return half and torch.backends.mkl.is_available() and _agrees()  # type: ignore[no-untyped-call]


def _agrees() -> bool:
    """Return whether torch has the oneDNN operator, and its results equal torch's own product."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 768, generator=draw), torch.randn(768, 768, generator=draw)
    try:
        result, expected = _onednn(x, weight.mT, None), x @ weight
    except RuntimeError:
        return False
    return bool((result - expected).norm() <= 1e-5 * expected.norm())
