"""Coefficients for each group of layers. Source: our choice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from mta.config import MergeSettings
from mta.evaluation.methods.merged import MergeMethod, answered
from mta.evaluation.protocol import Outcome, TestBatch
from mta.personalize.merge import learn
from mta.system.device import clock
from mta_lab.policies import Learned


class MergedByLayer(MergeMethod):
    """The learned policy with separate coefficients for each of ``groups`` equally deep groups of layers."""

    seeded: ClassVar[bool] = True
    method: Literal["merge-by-layer"] = "merge-by-layer"
    name: str = "merge only, by layer"
    merge: MergeSettings | None = None
    groups: int = 3
    learned: Learned = Learned()

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        settings, bank = batch.merge_settings(self.merge), batch.bank
        zero = self.learned.start == "zero"
        policy = "uniform" if zero else "posterior"  # of the same anchors
        first, seconds = batch.merge(settings.model_copy(update={"policy": policy, "options": {}}), seed)
        if zero:
            first = replace(first, w=torch.zeros_like(first.w))
        start = clock(batch.base.device)
        merge = learn(
            batch.base,
            batch.jobs,
            bank.device_anchors,
            bank.task_adapters,
            replace(first, w=first.w.to(batch.base.master_dtype)),
            self.learned.training,
            layer_groups(bank.device_anchors.names, self.groups),
            seed=seed,
            tokens_per_batch=batch.plan(self.groups * len(bank), settings).tokens_per_batch,
        )
        return answered(batch, merge, seconds + clock(batch.base.device) - start)


def layer_groups(names: Sequence[str], groups: int) -> list[int]:
    """Return the group of each adapted layer: ranges of equal depth, numbered from the input on."""
    blocks = [int(numbers[0]) if (numbers := re.findall(r"\d+", name)) else 0 for name in names]
    depth = max(blocks) + 1
    return [block * min(groups, depth) // depth for block in blocks]
