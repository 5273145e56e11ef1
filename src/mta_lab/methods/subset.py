"""A smaller bank inside a bank, to compare numbers of anchors without training again. Source: our choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import model_validator

from mta.bank.anchors import one_per_cluster
from mta.config import MergeSettings
from mta.data.tasks.task import Task
from mta.evaluation.methods.merged import MTA_PAPER, MergeMethod, answered
from mta.evaluation.protocol import Outcome, TestBatch
from mta.personalize.evidence import Evidence, Labels
from mta.personalize.merge import Merge, coefficients, needs_encodings, needs_evidence
from mta.personalize.policies import policy_named
from mta.system.device import clock


class MergedAmong(MergeMethod):
    """Stage 2 alone, as if the bank held only ``anchors`` anchors."""

    paper: ClassVar[str] = MTA_PAPER
    method: Literal["merge-among"] = "merge-among"
    name: str = "merge only, smaller bank"
    merge: MergeSettings
    anchors: int

    @model_validator(mode="after")
    def _check_anchors(self) -> Self:
        kind = None if self.merge.policy == "auto" else policy_named(self.merge.policy)
        if kind is None or kind.gradients or kind.learns is not None:
            raise ValueError("anchors: needs merge: with a policy that reads only encodings or the anchors' losses")
        if self.merge.k > self.anchors:
            raise ValueError(f"merge.k is {self.merge.k}, but only {self.anchors} anchors are merged")
        return self

    def fits(self, task: Task, anchors: int, calibrated: bool) -> bool:
        return super().fits(task, anchors, calibrated) and self.anchors <= anchors

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        settings, bank = self.merge, batch.bank
        # The most active anchor of each cluster, as the bank chose anchors among candidates.
        chosen = one_per_cluster(bank.vectors, self.anchors, 0, lambda n, _: (-bank.info.items[n], n))
        reads = needs_evidence(settings)
        evidence, similarity = _evidence_of(batch.evidence, chosen) if reads else None, batch.similarity[:, chosen]
        start = clock(batch.base.device)
        chosen_merge = coefficients(settings, similarity, evidence)
        merge = Merge(torch.tensor(chosen)[chosen_merge.ids], chosen_merge.w.to(batch.base.master_dtype))
        share = batch.evidence_seconds * (len(chosen) + 1) / (len(bank) + 1) if reads else 0.0
        share += batch.encoding_seconds if needs_encodings(settings) else 0.0
        return answered(batch, merge, clock(batch.base.device) - start + share)


def _evidence_of(whole: Evidence, anchors: Sequence[int]) -> Evidence:
    """Return the evidence for a bank that holds only these ``anchors``."""
    columns = [0, *(n + 1 for n in anchors)]
    labels = whole.labels and Labels(whole.labels.scores[..., columns], whole.labels.gold)
    return Evidence(whole.loglik[..., columns], whole.counts, labels)
