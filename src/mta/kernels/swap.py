"""Replace norms and rotary positions of a transformers model by kernels.

A module is changed only if its class has a known form and both computations agree on test numbers. Modules keep their
weights and hooks; only ``forward`` changes.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mta.kernels.compile import kernels
from mta.kernels.functions import RmsNorm, Rotate
from mta.kernels.linear import frozen_product

_ROTARY = "apply_rotary_pos_emb"


def use_kernels(model: nn.Module) -> list[str]:
    """Replace all modules that have kernels, and return the names of their classes; empty without kernels.

    Linear layers use ``product``; they keep the same tensors for the backward pass as before.
    """
    if not next(model.parameters()).is_cpu:  # kernels are for CPUs: compile none
        return []
    agrees: dict[type, bool] = {}
    with torch.no_grad():
        for module in model.modules():
            kind = type(module)
            for make in (_norm, _attention):
                faster = make(module) if agrees.get(kind, True) else None
                if faster and kind not in agrees:
                    agrees[kind] = make is _attention or _agree(module, faster)
                if faster and agrees[kind]:
                    module.forward = faster
            if type(module) is nn.Linear and kernels("linear", module.weight) is not None:
                vars(module)["forward"] = partial(_linear_forward, module, module.forward)
    return sorted(kind.__name__ for kind, agree in agrees.items() if agree)


def _norm(module: nn.Module) -> Callable[..., Tensor] | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    named = type(module).__name__.endswith("RMSNorm")
    if named and isinstance(weight, Tensor) and isinstance(eps, float) and kernels("norm", weight) is not None:
        return partial(_norm_forward, module, module.forward, eps)
    return None


def _norm_forward(module: Any, plain: Callable[..., Tensor], eps: float, hidden_states: Tensor) -> Tensor:
    if module.weight.requires_grad or kernels("norm", hidden_states, module.weight) is None:
        return plain(hidden_states)
    return RmsNorm.apply(hidden_states, module.weight, eps)  # type: ignore[no-untyped-call]


def _linear_forward(module: Any, plain: Callable[..., Tensor], x: Tensor) -> Tensor:
    if module.weight.requires_grad or kernels("linear", x, module.weight) is None:
        return plain(x)
    return frozen_product(module, x)


def _agree(module: Any, faster: Callable[..., Tensor]) -> bool:
    weight = module.weight
    x = torch.linspace(-2, 3, 4 * weight.shape[-1], dtype=weight.dtype, device=weight.device).view(1, 4, -1)
    expected, result = module.forward(x), faster(x)
    return expected.dtype == result.dtype and _near(result, expected)


def _near(result: Tensor, expected: Tensor) -> bool:
    double = expected.dtype == torch.float64  # norms are computed in float32
    tolerance = 1e-6 if double else 4 * torch.finfo(expected.dtype).eps
    return float((result - expected).double().norm()) <= tolerance * float(expected.double().norm())


def _attention(module: nn.Module) -> Callable[..., Any] | None:
    """Return the module's own forward with another function for rotary positions."""
    forward: Any = inspect.unwrap(type(module).forward)
    names = getattr(forward, "__globals__", {})
    plain = names.get(_ROTARY)
    if plain is None or _ROTARY not in forward.__code__.co_names or not _rotates(plain):
        return None
    other = types.FunctionType(
        forward.__code__, {**names, _ROTARY: partial(_rotary, plain)}, None, forward.__defaults__, forward.__closure__
    )
    other.__kwdefaults__ = forward.__kwdefaults__
    return types.MethodType(other, module)


def _rotary(
    plain: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    whole = cos.ndim == 3 and q.ndim == 4 and q.shape[-1] == cos.shape[-1] and unsqueeze_dim == 1
    if not whole or kernels("rotate", q, k, cos, sin) is None or not cos.is_contiguous() or not sin.is_contiguous():
        return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    return Rotate.apply(q, cos, sin), Rotate.apply(k, cos, sin)  # type: ignore[no-untyped-call]


def _rotates(plain: Callable[..., Any]) -> bool:
    """Return whether a model's function computes the same rotation by halves as the kernel."""
    draw = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=draw) for shape in ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8))
    )
    if kernels("rotate", q) is None:
        return False
    try:
        expected = plain(q, k, cos, sin)
    except (TypeError, RuntimeError, ValueError):
        return False
    return all(_near(result, right) for result, right in zip(_rotary(plain, q, k, cos, sin), expected))
