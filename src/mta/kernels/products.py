"""Products with frozen weights, by the method that is fastest on this processor.

torch multiplies float32 with MKL, which uses half of the vector width on processors of other makers than Intel. oneDNN,
which torch also contains, uses the full width. The processor's type decides, not a measurement: the libraries round
differently, and all workers on one type of processor must compute the same bytes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mta.kernels.compile import kernels, wide
from mta.system.device import cpuinfo

_FEW = 24  # rows


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
        fits = rows <= _FEW and all(part.is_contiguous() for part in parts)
        found = kernels("adapted_rows", *parts) if fits else None
        self._run = found["adapted_rows"] if found else None
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


class FrozenLinear(Function):
    """``product`` with a gradient of x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(dy, weight.mT), None, None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return made


@cache
def _onednn_is_faster() -> bool:
    """Return whether MKL uses half of this processor's vector width, and oneDNN computes the same results."""
    half = "avx512f" in cpuinfo("flags").split() and cpuinfo("vendor_id") != "GenuineIntel"
    return half and torch.backends.mkl.is_available() and _agrees()  # type: ignore[no-untyped-call]


def _agrees() -> bool:
    """Return whether torch has the oneDNN operator, and its results equal torch's own product."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 768, generator=draw), torch.randn(768, 768, generator=draw)
    try:
        found, expected = _onednn(x, weight.mT, None), x @ weight
    except RuntimeError:
        return False
    return bool((found - expected).norm() <= 1e-5 * expected.norm())
