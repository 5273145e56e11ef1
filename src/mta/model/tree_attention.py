"""Attention over token trees: a block of neighbouring tokens and all the tokens they may see, instead of whole rows.

A row is a tree of tokens in depth-first order (``mta.training.packing``). Token i sees token j exactly when

    j <= i < end[j]        end[j] is one past the last token of j's subtree

Most pairs of a row are of different branches and see nothing of each other. Any stretch of a row sees only its first
token's ancestors and itself, so the row is cut into stretches of similar size, and each attends to those tokens alone.
``install`` gives a transformers model this attention for calls that bring ``blocks``; all others go through SDPA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mta.errors import UnsupportedModel
from mta.kernels import TreeAttention, kernels
from mta.model.adaptable import text_config

NAME = "mta_tree"
_SIZES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)  # of a block, in tokens
_GATHER = 16  # what fetching a token costs, in query-key pairs
_EVEN = 8  # K is a multiple of it: products with odd rows of bfloat16 take twice as long
_REFUSED = ("softcap", "s_aux", "position_bias")  # what SDPA cannot do either, or what would need dense rows


def visible(ends: Tensor) -> Tensor:
    """(B, T) ends of subtrees -> (B, T, T) bool: [b, i, j] = token i sees token j."""
    i = torch.arange(ends.shape[1], device=ends.device)
    return (i[None, None, :] <= i[None, :, None]) & (i[None, :, None] < ends[:, None, :])


@dataclass(frozen=True, slots=True)
class Blocks:
    """G stretches of Q tokens and the K tokens each may see, padded.

    Shapes: queries (G, Q) and keys (G, K), flat places in B * T; seen (G, Q, K) bool; place (B * T,), where each token
    stands in G * Q. Token t stands among the keys, G * K, at ``slots[starts[t] : starts[t + 1]]``; ``each`` counts
    0 ... B * T.
    """

    queries: Tensor
    keys: Tensor
    seen: Tensor
    place: Tensor
    slots: Tensor
    starts: Tensor
    each: Tensor


def blocks_of(ends: Tensor, positions: Tensor) -> Blocks:
    """Cut rows (B, T) into stretches of the size at which attention costs least."""
    rows, depths = ends.cpu().numpy(), positions.cpu().numpy()
    tokens = rows.shape[1]
    best = min((_cuts(rows, depths, min(size, tokens)) for size in _SIZES), key=lambda cuts: _cost(cuts, depths))
    wide, deep = _sizes(best, depths)
    queries, keys = np.full((len(best), wide), -1), np.full((len(best), deep), -1)
    place = np.zeros(rows.size, dtype=np.int64)
    for g, (row, start, stop) in enumerate(best):
        seen = np.append(np.flatnonzero(rows[row, :start] > start), np.arange(start, stop))
        queries[g, : stop - start], keys[g, : len(seen)] = np.arange(start, stop), seen
        place[row * tokens + start : row * tokens + stop] = g * wide + np.arange(stop - start)
    whose = np.array([row for row, _, _ in best])[:, None]
    q, k = queries[:, :, None], keys[:, None, :]
    sees = (k >= 0) & (k <= q) & (q < rows[whose, keys.clip(0)][:, None, :])
    flat = np.where(keys >= 0, keys + whose * tokens, rows.size).ravel()
    slots = np.argsort(flat, kind="stable")[: np.count_nonzero(keys >= 0)]
    each = np.arange(rows.size + 1)
    starts = np.searchsorted(flat[slots], each)
    made = (queries.clip(0) + whose * tokens, keys.clip(0) + whose * tokens, sees, place, slots, starts, each)
    return Blocks(*(torch.from_numpy(part).to(ends.device) for part in made))


def _cuts(rows: Any, depths: Any, size: int) -> list[tuple[int, int, int]]:
    """(row, start, stop) of stretches of at most ``size`` tokens, cut where the least lies above: between branches."""
    cuts = []
    for row, (ends, depth) in enumerate(zip(rows, depths)):
        # Where a branch begins: after a token that has several children, or after another branch.
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
    """Q and K: the most tokens of a stretch, and the most that one sees, made up to whole vectors."""
    wide = max(stop - start for _, start, stop in cuts)
    deep = max(int(depths[row, start]) + stop - start for row, start, stop in cuts)
    return wide, -(-deep // _EVEN) * _EVEN


def _cost(cuts: Sequence[tuple[int, int, int]], depths: Any) -> float:
    wide, deep = _sizes(cuts, depths)
    return len(cuts) * (wide * deep + _GATHER * (wide + deep))


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, Q, K) bool -> (n, 1, Q, K): 0 where a token is seen, the least number where it is not."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)


def masks(model: Any, seen: Tensor, queries: Tensor, keys: Tensor) -> Tensor | dict[str, Tensor]:
    """Additive masks as transformers wants them: one, or one per kind of layer where some kinds see only what is near.

    Shapes: seen (n, Q, K) bool; positions of queries (n, Q) and keys (n, K).
    """
    config, queries, keys = text_config(model), queries[:, :, None], keys[:, None, :]
    kinds = set(getattr(config, "layer_types", None) or ())
    near = dict[str, Tensor]()
    if window := getattr(config, "sliding_window", None):
        near["sliding_attention"] = queries - keys < window
    if chunk := getattr(config, "attention_chunk_size", None):
        near["chunked_attention"] = queries // chunk == keys // chunk
    if not kinds and window:
        return additive(seen & near["sliding_attention"], model.dtype)
    found = {kind: additive(seen & near[kind], model.dtype) for kind in sorted(kinds & near.keys())}
    whole = additive(seen, model.dtype)
    return {"full_attention": whole, **found} if found else whole


def can_block(model: Any) -> bool:
    """Whether a model's attention is an exchangeable function of query, key and value alone."""
    special = ("attn_logit_softcapping", "attention_bias_type", "alibi")
    plain = not any(getattr(text_config(model), name, None) for name in special)
    exchangeable = getattr(model, "_supports_attention_backend", False) and getattr(model, "_supports_sdpa", False)
    return bool(exchangeable) and plain


def install(model: Any) -> None:
    """Let ``model`` use ``tree_attention``. Weights and results stay as they are."""
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
    attention_mask: Tensor | None,
    scaling: float | None = None,
    blocks: Blocks | None = None,
    **how: Any,
) -> tuple[Tensor, None]:
    """Attention of each block's queries to its keys, softmax in at least float32; without ``blocks`` it is SDPA.

    Shapes: query (B, H, T, E), key and value (B, H / share, T, E), attention_mask (G, 1, Q, K) -> (B, T, H, E).
    Raises UnsupportedModel for models that do more to their scores than to scale and mask them.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if blocks is None or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **how)
    if odd := [name for name in _REFUSED if how.get(name) is not None]:
        raise UnsupportedModel(
            f"this model's attention uses {odd[0]}, which token trees do not support",
            hint="Give a base whose scores are only scaled and masked, such as Llama, Mistral, Qwen or Gemma 3.",
        )
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


def _fetch(x: Tensor, places: Tensor) -> Tensor:
    """(B, H, T, E) at flat places (G, n) -> (G, n, H, E)."""
    flat = x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])
    return flat.index_select(0, places.flatten()).view(*places.shape, x.shape[1], x.shape[3])
