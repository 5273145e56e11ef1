"""Per-Pcs: a person's LoRA put together module by module from the anchors' pieces, nothing trained for the person."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mta.config import MergeSettings
from mta.data.tasks.prompt import Example
from mta.errors import InputError
from mta.evaluation.methods.merged import answered
from mta.evaluation.methods.method import Method, Outcome, register
from mta.evaluation.protocol import Panel
from mta.lora.layers import Adapters, applied
from mta.model.base import BaseModel
from mta.personalize.likelihoods import shots_of
from mta.personalize.merge import Merge

EACH = 32  # items of an anchor that its gates are made from


@register
class PerPcs(Method):
    """Each module takes the ``k`` anchors whose gates fit what the person's shots send through it, by softmax.

    An anchor's gate at a module is the mean input its own items send there, less the mean of all anchors: our choice.
    The published gates are trained for 200 steps each; these cost one pass.
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
                hint="Panel.of(…, anchors=…), or leave the method out.",
            )
        if "per-pcs" not in panel.memo:
            panel.memo["per-pcs"] = self._gates(panel)
        gates = panel.memo["per-pcs"]
        start = time.monotonic()
        inputs = mean_inputs(panel.base, [job.examples for job in panel.jobs], panel.bank.pooled)
        k = min(self.k, len(panel.bank))
        weights = []
        for name in panel.bank.working.names:
            centre, gate = gates[name]
            fit = torch.nn.functional.normalize(inputs[name] - centre, dim=1) @ gate.T  # (U, N)
            top = fit.topk(k, dim=1)
            shares = torch.softmax(top.values / self.tau, dim=1)
            weights.append(torch.zeros_like(fit).scatter(1, top.indices, shares))
        w = torch.stack(weights, 1).to(panel.base.master_dtype)  # (U, L, N)
        ids = torch.arange(len(panel.bank)).expand(len(w), -1)
        settings = MergeSettings(policy="uniform", k=0)
        return answered(panel, Merge(ids, w), settings, time.monotonic() - start)

    @staticmethod
    def _gates(panel: Panel) -> dict[str, tuple[Tensor, Tensor]]:
        """Module by module, the anchors' mean input (D,) and their directions from it (N, D)."""
        jobs = [shots_of(panel.base, panel.bank.task, anchor.latest(EACH)).examples for anchor in panel.anchors]
        found = mean_inputs(panel.base, jobs, panel.bank.pooled)
        return {
            name: (means.mean(0), torch.nn.functional.normalize(means - means.mean(0), dim=1))
            for name, means in found.items()
        }


@torch.inference_mode()
def mean_inputs(
    base: BaseModel, jobs: Sequence[Sequence[Example]], adapters: Sequence[Adapters], rows_per_batch: int = 16
) -> dict[str, Tensor]:
    """What reaches each adapted module, averaged over the tokens of a job's examples: name -> (U, D)."""
    rows = sorted(((u, e.tokens) for u, job in enumerate(jobs) for e in job), key=lambda row: len(row[1]))
    sums = {name: torch.zeros(len(jobs), d, dtype=torch.float64) for name, (d, _) in base.targets.items()}
    counts = torch.zeros(len(jobs), 1, dtype=torch.float64)
    for start in range(0, len(rows), rows_per_batch):
        chosen = rows[start : start + rows_per_batch]
        width = max(len(tokens) for _, tokens in chosen)
        tokens = torch.tensor([[*t, *[base.pad_token] * (width - len(t))] for _, t in chosen], device=base.device)
        mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for _, t in chosen], device=base.device)
        owner = torch.tensor([u for u, _ in chosen])
        counts.index_add_(0, owner, mask.sum(1, keepdim=True).cpu().double())
        with applied(base.model, adapters, owner.to(base.device)), _watched(base, sums, owner, mask):
            base.model(input_ids=tokens, attention_mask=mask, use_cache=False)
    return {name: total / counts for name, total in sums.items()}


@contextmanager
def _watched(base: BaseModel, sums: dict[str, Tensor], owner: Tensor, mask: Tensor) -> Iterator[None]:
    """Within the block, what enters a module is added to its sums."""

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].view(*mask.shape, -1)
            sums[name].index_add_(0, owner, (x * mask[..., None].to(x)).double().sum(1).cpu())

        return hook

    hooks = [base.model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in sums]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
