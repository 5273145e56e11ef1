"""Pack the examples of one person into token trees, so that shared prefixes are computed once.

Examples that begin with the same tokens (chat template, instruction, the same text before two labels) share them.
A row is a tree in depth-first order. Token i sees token j exactly when j is i itself or an ancestor of i:

    visible[i, j]  =  j <= i < end[j]        end[j] is one past the last token of j's subtree

Positions are depths. A causal prefix does not see later tokens, so losses and gradients equal those of separate rows.
The last token of an example is predicted, but never an input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mta.data.tasks.prompt import Example
from mta.model.base import BaseModel
from mta.system.device import moved

TOKENS = 2048  # of a pass for which nothing was planned


@dataclass(frozen=True, slots=True)
class TreeRow:
    """A token tree in depth-first order, and its targets.

    The logits at place ``sources[i]`` of the row predict token ``targets[i]`` of example ``examples[i]``;
    ``logit_count`` places need logits.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    ends: tuple[int, ...]
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    examples: tuple[int, ...]
    logit_count: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one batch as tensors, padded to the longest row.

    Shapes: tokens, positions, ends (B, T); places (m,) distinct flat indices into B * T that need logits;
    for the n predicted tokens: source (n,) into places, target (n,) token ids, owner (n,), and example (n,).
    """

    tokens: Tensor
    positions: Tensor
    ends: Tensor
    places: Tensor
    source: Tensor
    target: Tensor
    owner: Tensor
    example: Tensor

    def logits(self, base: BaseModel) -> Tensor:
        """Return the logits of ``places``, (m, V); those of the targets are not rounded to a dtype below float32."""
        return base.logits(self.tokens, self.ends, self.positions, self.places, (self.source, self.target))

    def log_probs(self, logits: Tensor) -> Tensor:
        """Return the log probabilities of predicted tokens, (n,), in at least float32; logits (m, V) of ``places``."""
        table = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
        return table[self.source, self.target]


def tree(examples: Sequence[Example], chosen: Iterable[int]) -> TreeRow:
    """Return one row that holds the examples with the numbers ``chosen``."""
    tokens, positions, ends = list[int](), list[int](), list[int]()
    predicted = list[tuple[int, int, int]]()
    path = list[int]()  # places of the current branch, root first
    before: tuple[int, ...] = ()
    for e in sorted(chosen, key=lambda e: examples[e].tokens):
        fed = examples[e].tokens[:-1]
        shared = common_prefix(before, fed)
        for place in path[shared:]:
            ends[place] = len(tokens)
        del path[shared:]
        for depth in range(shared, len(fed)):
            path.append(len(tokens))
            tokens.append(fed[depth])
            positions.append(depth)
            ends.append(0)
        start = examples[e].target_start
        predicted += [(path[d - 1], examples[e].tokens[d], e) for d in range(start, len(examples[e].tokens))]
        before = fed
    for place in path:
        ends[place] = len(tokens)
    sources, targets, owners = zip(*predicted)
    return TreeRow(tuple(tokens), tuple(positions), tuple(ends), sources, targets, owners, len(set(sources)))


def pack(
    examples: Sequence[Example],
    attention_price: float,
    *,
    blocked: bool = False,
    budget: int = TOKENS,
    weight: float = 0.0,
) -> list[TreeRow]:
    """Return the cheapest rows for one person's examples.

    A row of several examples has at most ``budget`` tokens (0: no row has several); a target token counts as
    ``weight`` tokens more, for its logits. A row of T tokens costs T + attention_price * T * S. S is the length of the
    row or, with ``blocked`` attention (``mta.model.tree_attention``), of its longest example. Examples sorted by their
    tokens are cut into runs; dynamic programming finds the cheapest cut.
    """
    order = sorted(range(len(examples)), key=lambda e: examples[e].tokens)
    lengths = [len(examples[e].tokens) - 1 for e in order]
    heads = [weight * len(examples[e].target) for e in order]
    shared = [0] + [common_prefix(examples[a].tokens[:-1], examples[b].tokens[:-1]) for a, b in pairwise(order)]
    best, cut = [0.0], [0]
    for stop in range(1, len(order) + 1):
        size, deepest, logits, options = 0, 0, 0.0, []
        for start in range(stop - 1, -1, -1):
            size += lengths[start] - (shared[start + 1] if start + 1 < stop else 0)
            deepest = max(deepest, lengths[start])
            logits += heads[start]
            if start + 1 < stop and size + logits > budget:
                break
            options.append((best[start] + size + attention_price * size * (deepest if blocked else size), start))
        price, start = min(options)
        best.append(price)
        cut.append(start)
    rows, stop = [], len(order)
    while stop:
        rows.append(tree(examples, order[cut[stop] : stop]))
        stop = cut[stop]
    return rows[::-1]


def pack_for(base: BaseModel, examples: Sequence[Example], budget: int) -> list[TreeRow]:
    """Return the cheapest rows of one person's examples for a base; one row per example if it cannot take trees."""
    budget, weight = budget if base.packable else 0, base.footprint.target_weight
    return pack(examples, base.attention_price, blocked=base.blocked, budget=budget, weight=weight)


def fitting(rows: Iterable[TreeRow], width: int, budget: int, weight: float) -> int:
    """Return how many of the first ``rows``, padded to ``width``, fit into one pass of ``budget``: at least one."""
    count, size = 0, 0.0
    for row in rows:
        size += width + weight * row.logit_count
        if count and size > budget:
            break
        count += 1
    return count


def collate(rows: Sequence[TreeRow], pad: int, device: torch.device, owners: Sequence[int] | None = None) -> Rows:
    """Return rows as padded tensors on ``device``; positions and ends, which describe the trees, stay on the CPU.

    ``owners`` are the numbers that predicted tokens get from their rows; by default, rows are numbered in order. The
    subtree of a padding token is itself, so no other token sees it.
    """
    width = max(len(row.tokens) for row in rows)
    tokens, positions, ends = [], [], []
    for row in rows:
        fill = range(len(row.tokens), width)
        tokens.append(row.tokens + (pad,) * len(fill))
        positions.append(row.positions + (0,) * len(fill))
        ends.append(row.ends + tuple(i + 1 for i in fill))
    flat = [
        (r * width + source, target, owner, example)
        for r, (row, owner) in enumerate(zip(rows, owners or range(len(rows))))
        for source, target, example in zip(row.sources, row.targets, row.examples)
    ]
    place, target, owner, example = torch.tensor(flat).unbind(1)
    places, source = torch.unique(place, return_inverse=True)  # on the CPU: on a GPU it would wait for earlier passes
    fed, *asked = moved(device, torch.tensor(tokens), places, source, target, owner, example)
    return Rows(fed, torch.tensor(positions), torch.tensor(ends), *asked)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))
