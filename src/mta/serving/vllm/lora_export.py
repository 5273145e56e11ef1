"""Combines task LoRA, merge, and stack into one adapter of bounded rank, for servers with one LoRA per request.

The stack is kept exactly; task LoRA and merge are truncated by svd to the remaining rank. The shared factors are
decomposed once, so truncating for one person needs only the svd of small cores:

    sum over ranks p of gate[p] * B_p A_p  =  Q_B (R_B diag(gate) R_A^T) Q_A^T
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mta.errors import InputError, OtherBank, StateCorrupt
from mta.lora.batch import Factors, LoraBatch, join, shared_ranks
from mta.lora.merge import truncate
from mta.personalize.adapters import BASE, Nobody, merge_as_lora, merge_of
from mta.store.state import State
from mta.system.device import seeded

_OVERSAMPLING = 8  # additional directions in the randomized svd, for accurate last singular values
_ITERATIONS = 4  # power iterations of the randomized svd


class _Spans(NamedTuple):
    """QR decompositions of one layer's shared factors A (P, D) and B (O, P)."""

    q_a: Tensor
    r_a: Tensor
    q_b: Tensor
    r_b: Tensor


class LoraExporter:
    """Builds adapters of rank at most ``rank`` from a bank's anchors, its task LoRA, and people's states."""

    def __init__(self, anchors: LoraBatch, task_lora: LoraBatch | None, bank: str, rank: int) -> None:
        self.anchors, self.task_lora, self.bank, self.rank = anchors, task_lora, bank, rank
        shared = [batch for batch in (task_lora, anchors) if batch is not None]
        self._spans = {name: _spans(*shared_ranks(shared, name)) for name in anchors.names}

    def adapter(self, owner: State | Nobody, stacked: bool = True) -> tuple[LoraBatch, float]:
        """Return one adapter with scale 1, and the relative Frobenius error of truncating task LoRA and merge.

        Raises InputError for the base (no adapter) and for a stack that fills the slot; OtherBank; StateCorrupt.
        """
        if isinstance(owner, Nobody):
            if owner is BASE or self.task_lora is None:
                raise InputError("the base has no adapter", hint="Use vLLM's name for the base.")
            return self._truncated(self.task_lora, self.rank)
        if owner.bank != self.bank:
            raise OtherBank("the person's state was made with another bank", hint="Personalize again: mta personalize")
        stack = owner.stack if stacked else None
        room = self.rank - (stack.rank if stack else 0)
        if room < 1:
            raise InputError(
                f"a stack of rank {stack and stack.rank} leaves no room in a slot of rank {self.rank}",
                hint="Give vLLM larger slots:  --vllm-args '--max-lora-rank 32'",
            )
        merged, error = self._merged(owner, room)
        whole = join([merged, stack]) if stack else merged
        if any(not part.isfinite().all() for pair in whole.factors.values() for part in pair):
            raise StateCorrupt("a person's adapter contains NaN or infinity", hint="Personalize again.")
        return whole, error

    def _merged(self, state: State, room: int) -> tuple[LoraBatch, float]:
        """Return task LoRA and merge truncated to rank ``room``, and the relative error."""
        if state.mode != "exact":
            own = merge_as_lora(self.anchors, state, torch.float32)
            return self._truncated(join([self.task_lora, own]) if self.task_lora else own, room)
        gates = merge_of([state], torch.float32).gates(len(self.anchors))[0]
        shares = gates.repeat_interleave(self.anchors.rank)
        pooled = [shares.new_ones(self.task_lora.rank)] if self.task_lora else []
        return _truncate_cores(self._spans, torch.cat([*pooled, shares]), room)

    @staticmethod
    def _truncated(adapter: LoraBatch, rank: int) -> tuple[LoraBatch, float]:
        if adapter.rank <= rank:
            return adapter.scaled_into_b(), 0.0
        truncated, error = truncate(adapter, rank)
        return truncated, float(error)


def _spans(a: Tensor, b: Tensor) -> _Spans:
    return _Spans(*torch.linalg.qr(a.mT), *torch.linalg.qr(b))


def _truncate_cores(spans: dict[str, _Spans], gates: Tensor, rank: int) -> tuple[LoraBatch, float]:
    """Return the shared updates weighed by ``gates`` at rank ``rank``, and the relative error over all layers."""
    factors, lost, total = {}, 0.0, 0.0
    with seeded(0, torch.device("cpu")):  # reproducible: the same state gives the same adapter
        for name, (q_a, r_a, q_b, r_b) in spans.items():
            core = (r_b * gates) @ r_a.mT
            u, s, v = _leading(core, rank)
            root = s.sqrt()
            factors[name] = Factors(((v * root).mT @ q_a.mT)[None], (q_b @ (u * root))[None])
            lost += float((core - (u * s) @ v.mT).square().sum())
            total += float(core.square().sum())
    return LoraBatch(factors), (lost / total) ** 0.5 if total else 0.0


def _leading(core: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``rank`` largest singular triples, (O, r), (r,), (D, r); fewer if the core is smaller."""
    if rank + _OVERSAMPLING < min(core.shape) // 2:
        u, s, v = torch.svd_lowrank(core, q=rank + _OVERSAMPLING, niter=_ITERATIONS)
    else:
        u, s, vt = torch.linalg.svd(core, full_matrices=False)
        v = vt.mT
    return u[:, :rank], s[:rank], v[:, :rank]
