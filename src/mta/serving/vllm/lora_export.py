"""Task LoRA, merge and stack as one adapter of bounded rank: for servers that give each request one LoRA in a slot.

The stack is kept as it is; task LoRA and merge are cut by svd to the rank it leaves. What everybody shares is factored
once, so a person's cut is one of small cores:

    sum over ranks p of gate[p] * B_p A_p  =  Q_B (R_B diag(gate) R_A^T) Q_A^T
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mta.config import MergeSettings
from mta.errors import InputError, OtherBank, StateCorrupt
from mta.lora.batch import Factors, LoraBatch, join, shared_ranks
from mta.lora.merge import truncate
from mta.personalize.adapters import BASE, Nobody
from mta.personalize.merge import Merge, merged_factors
from mta.store.state import State
from mta.system.device import seeded

_MORE = 8  # directions beyond the wanted ones that the svd looks at, so that the last of these come out right
_ROUNDS = 4  # of its power iteration


class _Spans(NamedTuple):
    """One layer's shared factors as orthonormal directions and what they are mixed from: A (P, D), B (O, P)."""

    q_a: Tensor
    r_a: Tensor
    q_b: Tensor
    r_b: Tensor


class Synthesis:
    """Makes adapters of at most ``rank`` from a bank's anchors and task LoRA, and people's states."""

    def __init__(self, anchors: LoraBatch, task_lora: LoraBatch | None, bank: str, rank: int) -> None:
        self.anchors, self.task_lora, self.bank, self.rank = anchors, task_lora, bank, rank
        shared = [batch for batch in (task_lora, anchors) if batch is not None]
        self._spans = {name: _spans(*shared_ranks(shared, name)) for name in anchors.names}

    def adapter(self, whose: State | Nobody, stacked: bool = True) -> tuple[LoraBatch, float]:
        """One adapter with scale 1, and the relative error (Frobenius) that the cut makes in task LoRA and merge.

        Raises InputError for the base, which has none, and for a stack that fills the slot; OtherBank, StateCorrupt.
        """
        if isinstance(whose, Nobody):
            if whose is BASE or self.task_lora is None:
                raise InputError("the base has no adapter", hint="Ask vLLM for its own name of the base.")
            return self._cut(self.task_lora, self.rank)
        if whose.bank != self.bank:
            raise OtherBank("the person's state was made with another bank", hint="Personalize again: mta personalize")
        stack = whose.stack if stacked else None
        room = self.rank - (stack.rank if stack else 0)
        if room < 1:
            raise InputError(
                f"a stack of rank {stack and stack.rank} leaves no room in a slot of rank {self.rank}",
                hint="Give vLLM larger slots:  --vllm-args '--max-lora-rank 32'",
            )
        merged, error = self._merged(whose, room)
        whole = join([merged, stack]) if stack else merged
        if any(not part.isfinite().all() for pair in whole.factors.values() for part in pair):
            raise StateCorrupt("a person's adapter holds numbers that are not finite", hint="Personalize again.")
        return whole, error

    def _merged(self, state: State, room: int) -> tuple[LoraBatch, float]:
        """Task LoRA and merge at rank ``room``."""
        merge = Merge(torch.tensor([state.anchors]), torch.tensor([state.w]))
        if state.mode != "exact":
            own = merged_factors(self.anchors, merge, MergeSettings(mode=state.mode, rank=state.rank))
            return self._cut(join([self.task_lora, own]) if self.task_lora else own, room)
        shares = merge.gates(len(self.anchors))[0].repeat_interleave(self.anchors.rank).to(torch.float32)
        pooled = [shares.new_ones(self.task_lora.rank)] if self.task_lora else []
        return _cut_cores(self._spans, torch.cat([*pooled, shares]), room)

    @staticmethod
    def _cut(adapter: LoraBatch, rank: int) -> tuple[LoraBatch, float]:
        if adapter.rank <= rank:
            return adapter.scaled_into_b(), 0.0
        cut, error = truncate(adapter, rank)
        return cut, float(error)


def _spans(a: Tensor, b: Tensor) -> _Spans:
    return _Spans(*torch.linalg.qr(a.mT), *torch.linalg.qr(b))


def _cut_cores(spans: dict[str, _Spans], gates: Tensor, rank: int) -> tuple[LoraBatch, float]:
    """The sum of the shared updates as ``gates`` weigh them, at ``rank``, and its relative error over all layers."""
    factors, lost, total = {}, 0.0, 0.0
    with seeded(0, torch.device("cpu")):  # the same person gives the same adapter again
        for name, (q_a, r_a, q_b, r_b) in spans.items():
            core = (r_b * gates) @ r_a.mT
            u, s, v = _leading(core, rank)
            root = s.sqrt()
            factors[name] = Factors(((v * root).mT @ q_a.mT)[None], (q_b @ (u * root))[None])
            lost += float((core - (u * s) @ v.mT).square().sum())
            total += float(core.square().sum())
    return LoraBatch(factors), (lost / total) ** 0.5 if total else 0.0


def _leading(core: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular triples, (O, r), (r,), (D, r); fewer where the core is smaller."""
    if rank + _MORE < min(core.shape) // 2:
        u, s, v = torch.svd_lowrank(core, q=rank + _MORE, niter=_ROUNDS)
    else:
        u, s, vt = torch.linalg.svd(core, full_matrices=False)
        v = vt.mT
    return u[:, :rank], s[:rank], v[:, :rank]
