"""MTA with merges that average the factors A and B separately: our reading of the authors' code, for the ablation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from mta.config import MergeSettings, StackSettings
from mta.evaluation.methods.merged import MTA_PAPER, MergeMethod, adapted
from mta.evaluation.protocol import Outcome, TestBatch
from mta.lora.batch import Factors, LoraBatch
from mta.lora.layers import Adapters, PerPerson
from mta.personalize.merge import Merge


class AveragedThenAdapt(MergeMethod):
    """Stage 2 with averaged factors (``merge_factor``), then the stack on top of it."""

    paper: ClassVar[str] = MTA_PAPER
    seeded: ClassVar[bool] = True
    method: Literal["mta-averaged"] = "mta-averaged"
    name: str = "MTA, averaged"
    merge: MergeSettings = MergeSettings(policy="similarity", k=2)
    stack: StackSettings = StackSettings()

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        anchors = batch.bank.device_anchors

        def averaged(merge: Merge) -> Sequence[Adapters]:
            return [PerPerson(merge_factor(anchors, merge.ids.to(anchors.device), merge.w.to(anchors.device)))]

        return adapted(batch, self.name, self.stack.lora, self.stack.training, seed, self.merge, averaged)


def merge_factor(anchors: LoraBatch, ids: Tensor, w: Tensor) -> LoraBatch:
    """Average A and B separately: delta[u] = scale * (sum_k w B_k) @ (sum_k w A_k), which has cross terms.

    Coefficients are not normalized; they sum to 1 in the policies that this merge is meant for.
    Shapes: ids, w (U, K); A (N, R, D), B (N, O, R) -> A (U, R, D), B (U, O, R), with the anchors' scale.
    """
    factors = {}
    for name, (a, b) in anchors.factors.items():
        share = w[:, :, None, None].to(a)
        factors[name] = Factors((share * a[ids]).sum(1), (share * b[ids]).sum(1))
    return LoraBatch(factors, anchors.scale)
