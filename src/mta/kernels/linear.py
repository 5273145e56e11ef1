"""Frozen linear layers, plain or quantized: their weights, products, and gradients of inputs. Source: QLoRA.

bitsandbytes quantizes and stores the weights. Each product restores one layer's weights in the base's dtype, and drops
them afterwards. bitsandbytes' own products are not used: those of 8-bit weights also round the inputs, in columns that
depend on the other rows of a batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mta.kernels.functions import product

_CLASSES = {"Linear4bit": 4, "Linear8bitLt": 8}  # bits of a weight
_INT8 = 127  # a row of 8-bit weights is its largest absolute value times numbers from -127 to 127


def bits_of(layer: nn.Module) -> int:
    """Return the bits of a quantized linear layer's weights; 0 for all other layers."""
    kind = type(layer)
    return _CLASSES.get(kind.__name__, 0) if kind.__module__.startswith("bitsandbytes.") else 0


def is_linear(layer: nn.Module) -> bool:
    """Return whether a layer computes x W^T + b: a plain or quantized nn.Linear."""
    return type(layer) is nn.Linear or bits_of(layer) > 0


def weight_of(layer: Any) -> Tensor:
    """Return the weight (O, D) of a linear layer, restored if it is quantized."""
    bits, weight = bits_of(layer), layer.weight
    if bits == 4:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).to(layer.compute_dtype)
    if bits == 8:
        scales = layer.state.SCB if weight.SCB is None else weight.SCB  # moved by a product of bitsandbytes
        restored = torch.empty_like(weight.data, dtype=layer.compute_dtype)
        return torch.mul(weight.data, (scales / _INT8)[:, None], out=restored)  # no copy in float32
    return weight


def dtype_of(layer: Any) -> torch.dtype:
    """Return the dtype in which a linear layer computes."""
    return layer.compute_dtype if bits_of(layer) else layer.weight.dtype


def use_restored_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Let quantized layers compute with their restored weights in ``dtype``."""
    for layer in filter(bits_of, model.modules()):  # the weight has the quant_state, too: twins share only that
        vars(layer).update(compute_dtype=dtype, forward=partial(frozen_product, layer), quant_state=None)


class FrozenLinear(Function):
    """The product of a frozen layer with a gradient of x only; the backward pass restores quantized weights again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return product(x, weight_of(layer), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return product(dy, weight_of(ctx.layer).mT), None


def frozen_product(layer: Any, x: Tensor) -> Tensor:
    """Return x W^T + b of a frozen linear layer."""
    if torch.is_grad_enabled() and x.requires_grad:
        return FrozenLinear.apply(x, layer)  # type: ignore[no-untyped-call]
    return product(x, weight_of(layer), layer.bias)
