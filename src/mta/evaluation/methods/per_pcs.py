"""Per-Pcs: assemble a person's LoRA module by module from the anchors' LoRAs, without training."""

from __future__ import annotations

import time
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mta.config import MergeSettings
from mta.errors import InputError
from mta.evaluation.methods.merged import answered
from mta.evaluation.methods.method import Method, Outcome, register
from mta.evaluation.module_inputs import mean_inputs
from mta.evaluation.protocol import Panel
from mta.personalize.merge import Merge


@register
class PerPcs(Method):
    """Each module merges the ``k`` anchors whose gates are nearest to the mean input of the person's shots, by softmax.

    An anchor's gate at a module is the mean input of its own items, minus the mean over all anchors: our choice.
    The published gates are trained for 200 steps each; these gates cost one pass.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2406.10471"
    method: Literal["per-pcs"] = "per-pcs"
    name: str = "Per-Pcs"
    k: int = 3
    tau: float = 0.1

    def run(self, panel: Panel, seed: int) -> Outcome:
        if not panel.anchors:
            raise InputError(
                "Per-Pcs needs the anchors' histories; give the people the bank was built from",
                hint="Context(…, anchors=…), or leave the method out.",
            )
        anchors = panel.shots.context.anchor_inputs  # shared by all panels, so the seconds do not include them
        start = time.monotonic()
        inputs = mean_inputs(panel.base, [job.examples for job in panel.jobs], panel.bank.pooled)
        k = min(self.k, len(panel.bank))
        weights = []
        for name in panel.bank.working.names:
            center, gate = gate_of(anchors[name])
            fit = torch.nn.functional.normalize(inputs[name] - center, dim=1) @ gate.T  # (U, N)
            top = fit.topk(k, dim=1)
            shares = torch.softmax(top.values / self.tau, dim=1)
            weights.append(torch.zeros_like(fit).scatter(1, top.indices, shares))
        w = torch.stack(weights, 1).to(panel.base.master_dtype)  # (U, L, N)
        ids = torch.arange(len(panel.bank)).expand(len(w), -1)
        settings = MergeSettings(policy="uniform", k=0)
        return answered(panel, Merge(ids, w), settings, time.monotonic() - start)


def gate_of(means: Tensor) -> tuple[Tensor, Tensor]:
    """Return the center (D,) of the anchors' mean inputs (N, D), and each anchor's direction from the center (N, D)."""
    center = means.mean(0)
    return center, torch.nn.functional.normalize(means - center, dim=1)
