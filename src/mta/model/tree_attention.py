"""Attention over token trees: each block of neighboring tokens attends only to the tokens it may see.

A row is a tree of tokens in depth-first order (``mta.training.packing``). Token i sees token j exactly when

    j <= i < end[j]        end[j] is one past the last token of j's subtree

Most pairs of tokens of a row are in different branches and do not see each other. A block of consecutive tokens sees
only its first token's ancestors and itself. So rows are cut into blocks of similar size, which attend to these tokens.
``install`` gives a transformers model this attention for calls with ``blocks`` or a mask of ``mta.model.flex``; other
calls use SDPA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from mta.errors import UnsupportedModel
from mta.kernels.compile import kernels
from mta.kernels.functions import TreeAttention
from mta.model import flex
from mta.system.device import moved

NAME = "mta_tree"
Mask = TypeVar("Mask")
_SIZES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)  # of a block, in tokens
_SMALL = 4  # of these sizes are not tried for a GPU: it would wait for their many cuts, which Python makes
_GATHER = 16  # cost of fetching a token, in query-key pairs
_EVEN = 8  # K is a multiple of this: products with odd rows of bfloat16 take twice as long
# Not supported by SDPA either, or need dense rows:
_REFUSED = frozenset({"softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices"})


def visible(ends: Tensor) -> Tensor:
    """Return (B, T, T) bool from ends of subtrees (B, T): [b, i, j] = token i sees token j."""
    i = torch.arange(ends.shape[1], device=ends.device)
    return (i[None, None, :] <= i[None, :, None]) & (i[None, :, None] < ends[:, None, :])


@dataclass(frozen=True, slots=True)
class Blocks:
    """G blocks of Q tokens and the K tokens each block may see, padded; ``positions`` (B, T) of all tokens.

    Shapes: seen (G, Q, K) bool; queries (G, Q) and keys (G, K), flat places in B * T; place (B * T,), the place of each
    token in G * Q. The places of token t among the keys, G * K, are ``slots[starts[t] : starts[t + 1]]``; ``each`` is
    0 ... B * T. These three stay on the CPU, whose kernels alone read them.
    """

    positions: Tensor
    seen: Tensor
    queries: Tensor
    keys: Tensor
    place: Tensor
    slots: Tensor
    starts: Tensor
    each: Tensor


def blocks_of(ends: Tensor, positions: Tensor, device: torch.device | None = None) -> Blocks:
    """Cut rows (B, T) into blocks of the size with the lowest cost of attention; on ``device``, or that of ``ends``."""
    rows, depths = ends.cpu().numpy(), positions.cpu().numpy()
    tokens = rows.shape[1]
    sizes = _SIZES if (device or ends.device).type == "cpu" else _SIZES[_SMALL:]
    best = min((_cuts(rows, depths, min(size, tokens)) for size in sizes), key=lambda cuts: _cost(cuts, depths))
    wide, deep = _sizes(best, depths)
    queries, keys = np.full((len(best), wide), -1), np.full((len(best), deep), -1)
    place = np.zeros(rows.size, dtype=np.int64)
    for g, (row, start, stop) in enumerate(best):
        seen = np.append(np.flatnonzero(rows[row, :start] > start), np.arange(start, stop))
        queries[g, : stop - start], keys[g, : len(seen)] = np.arange(start, stop), seen
        place[row * tokens + start : row * tokens + stop] = g * wide + np.arange(stop - start)
    row_of = np.array([row for row, _, _ in best])[:, None]
    last = np.where(keys >= 0, rows[row_of, keys.clip(0)], -1)  # one past the last token that sees the key
    flat = np.where(keys >= 0, keys + row_of * tokens, rows.size).ravel()
    slots = np.argsort(flat, kind="stable")[: np.count_nonzero(keys >= 0)]
    each = np.arange(rows.size + 1)
    starts = np.searchsorted(flat[slots], each)
    parts = queries, keys, last, queries.clip(0) + row_of * tokens, keys.clip(0) + row_of * tokens, place
    placed, q, k, past, *places = moved(device or ends.device, positions.cpu(), *map(torch.from_numpy, parts))
    sees = (k[:, None, :] <= q[:, :, None]) & (q[:, :, None] < past[:, None, :])
    return Blocks(placed, sees, *places, *map(torch.from_numpy, (slots, starts, each)))


def _cuts(rows: Any, depths: Any, size: int) -> list[tuple[int, int, int]]:
    """Return (row, start, stop) of blocks of at most ``size`` tokens, cut between branches at the lowest depth."""
    cuts = []
    for row, (ends, depth) in enumerate(zip(rows, depths)):
        # A branch begins after a token that has several children, or after another branch.
        begins = np.flatnonzero((depth[1:] <= depth[:-1]) | (ends[1:] < ends[:-1])) + 1
        start = 0
        while start < len(ends):
            stop = min(start + size, len(ends))
            if stop < len(ends) and len(inside := begins[(begins > start) & (begins <= stop)]):
                stop = int(inside[depth[inside] == depth[inside].min()][-1])
            cuts.append((row, start, stop))
            start = stop
    return cuts


def _sizes(cuts: Sequence[tuple[int, int, int]], depths: Any) -> tuple[int, int]:
    """Return Q and K: the most tokens of a block, and the most that a block sees, rounded up to whole vectors."""
    wide = max(stop - start for _, start, stop in cuts)
    deep = max(int(depths[row, start]) + stop - start for row, start, stop in cuts)
    return wide, -(-deep // _EVEN) * _EVEN


def _cost(cuts: Sequence[tuple[int, int, int]], depths: Any) -> float:
    wide, deep = _sizes(cuts, depths)
    return len(cuts) * (wide * deep + _GATHER * (wide + deep))


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an additive mask (n, 1, Q, K) from (n, Q, K) bool."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)


def masks(model: Any, seen: Tensor, queries: Tensor, keys: Tensor) -> Tensor | dict[str, Tensor]:
    """Return additive masks for transformers: one, or one per kind of layer if some kinds attend only to near tokens.

    Shapes: seen (n, Q, K) bool; positions of queries (n, Q) and keys (n, K).
    """
    queries, keys = queries[:, :, None], keys[:, None, :]
    return _by_kind(model, lambda near: additive(seen & near(queries, keys), model.dtype))


def flex_masks(model: Any, ends: Tensor, positions: Tensor) -> BlockMask | dict[str, BlockMask]:
    """Return the same masks of trees (B, T) for flex attention."""
    return _by_kind(model, lambda near: flex.tree_mask(ends, positions, near))


def _by_kind(model: Any, mask_of: Callable[[flex.Near], Mask]) -> Mask | dict[str, Mask]:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    near = dict[str, flex.Near]()
    if window := getattr(config, "sliding_window", None):
        near["sliding_attention"] = lambda query, key: query - key < window
    if chunk := getattr(config, "attention_chunk_size", None):
        near["chunked_attention"] = lambda query, key: query // chunk == key // chunk
    if not kinds and window:
        return mask_of(near["sliding_attention"])
    found = {kind: mask_of(near[kind]) for kind in sorted(kinds & near.keys())}
    whole = mask_of(lambda query, key: True)
    return {"full_attention": whole, **found} if found else whole


def can_block(model: Any) -> bool:
    """Return whether a model's attention is an exchangeable function of query, key, and value only."""
    special = ("attn_logit_softcapping", "attention_bias_type", "alibi", "index_topk")
    plain = not any(getattr(model.config.get_text_config(), name, None) for name in special)
    exchangeable = getattr(model, "_supports_attention_backend", False) and getattr(model, "_supports_sdpa", False)
    return bool(exchangeable) and plain


def install(model: Any) -> None:
    """Let ``model`` use ``tree_attention``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, tree_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    blocks: Blocks | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    """Compute attention of each block's queries to its keys, softmax in at least float32. Other masks: flex or SDPA.

    Shapes: query (B, H, T, E), key (B, H / share, T, E), value (B, H / share, T, V), attention_mask (G, 1, Q, K) ->
    (B, T, H, V).
    Raises UnsupportedModel for models that do not only scale and mask their scores.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if isinstance(attention_mask, BlockMask):
        _refuse_odd(how)
        return flex.attention(query, key, value, attention_mask, scaling), None
    if blocks is None or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **how)
    _refuse_odd(how)
    batch, heads, tokens, width = query.shape
    groups = key.shape[1]
    count, wide = blocks.queries.shape
    scale = width**-0.5 if scaling is None else scaling
    if kernels("attention", query, key, value, attention_mask):
        return TreeAttention.apply(query, key, value, attention_mask, blocks, scale), None  # type: ignore[no-untyped-call]
    q = _fetch(query, blocks.queries).view(count, wide, groups, heads // groups, width).permute(0, 2, 3, 1, 4)
    k, v = (_fetch(part, blocks.keys).transpose(1, 2).flatten(0, 1) for part in (key, value))  # (G * groups, K, E)
    scores = torch.bmm(scale * q.reshape(count * groups, -1, width), k.mT)  # (G * groups, share * Q, K)
    scores = scores.view(count, heads, wide, -1).add_(attention_mask)
    shares = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    seen = torch.bmm(shares.view(count * groups, -1, k.shape[1]), v)
    out = seen.view(count, heads, wide, -1).transpose(1, 2).reshape(count * wide, -1)
    return out.index_select(0, blocks.place).view(batch, tokens, heads, -1), None


def _refuse_odd(how: dict[str, Any]) -> None:
    if odd := [name for name in _REFUSED if how.get(name) is not None]:
        raise UnsupportedModel(
            f"this model's attention uses {odd[0]}, which token trees do not support",
            hint="Give a base that only scales and masks scores, such as Llama, Mistral, Qwen or Gemma 3.",
        )


def _fetch(x: Tensor, places: Tensor) -> Tensor:
    """Return tokens of x (B, H, T, E) at flat places (G, n), as (G, n, H, E)."""
    flat = x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])
    return flat.index_select(0, places.flatten()).view(*places.shape, x.shape[1], x.shape[3])
