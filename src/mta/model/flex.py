"""Attention over token trees in one kernel: PyTorch's flex attention, which compiles the trees' rule for a GPU.

Off unless ``MTA_ATTENTION=flex``, and only on a GPU: the blocks of ``mta.model.tree_attention`` are the reference, and
it is not measured yet which is faster. On a CPU, flex attention has no backward pass, and computes all pairs of tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mta.errors import ConfigError

VARIABLE = "MTA_ATTENTION"
Near = Callable[[Tensor, Tensor], Tensor | bool]  # positions of a query and a key -> whether the layer sees so far


def wanted(device: torch.device) -> bool:
    """Return whether the environment asks for flex attention on this device. Raises ConfigError."""
    value = os.environ.get(VARIABLE, "blocks")
    if value not in ("blocks", "flex"):
        raise ConfigError(f"{VARIABLE} is {value!r}", hint=f"Set it to blocks or flex:  export {VARIABLE}=flex")
    return value == "flex" and device.type == "cuda"


def tree_mask(ends: Tensor, positions: Tensor, near: Near) -> BlockMask:
    """Return the mask of rows (B, T) by the rule of ``mta.model.tree_attention`` and by distance."""
    batch, tokens = ends.shape

    def sees(row: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < ends[row, j]) & near(positions[row, i], positions[row, j])

    return create_block_mask(sees, batch, None, tokens, tokens, device=ends.device)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """Compute attention: query (B, H, T, E), key (B, H / share, T, E), value (B, H / share, T, V) -> (B, T, H, V)."""
    kernel = _compiled() if query.is_cuda else flex_attention
    shared = query.shape[1] != key.shape[1]
    return kernel(query, key, value, block_mask=mask, scale=scale, enable_gqa=shared).transpose(1, 2)


@cache
def _compiled() -> Any:
    # One entry for each head width, dtype, mode of autograd, and kind of row. Without fullgraph, a full cache would
    # fall back to storing all scores, without a word.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, fullgraph=True)
