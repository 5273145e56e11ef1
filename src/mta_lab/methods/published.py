"""Other papers' ways to combine a bank: module by module without training, and a search without gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mta.config import MergeSettings
from mta.data.tasks.prompt import Example
from mta.errors import InputError
from mta.evaluation.methods.merged import answered
from mta.evaluation.methods.method import Method
from mta.evaluation.protocol import Outcome, TestBatch
from mta.lora.layers import Adapters, applied
from mta.model.base import BaseModel
from mta.personalize.merge import Merge, merge_adapters
from mta.personalize.shots import shots_of
from mta.system.device import clock
from mta.system.extras import require
from mta.training.scoring import log_likelihood

ITEMS_PER_ANCHOR = 32  # latest items of an anchor that its mean inputs are computed from


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

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        if not batch.anchors:
            raise InputError(
                "Per-Pcs needs the anchors' histories; give the people the bank was built from",
                hint="Context(…, anchors=…), or leave the method out.",
            )
        anchors = anchor_inputs(batch)  # shared by all batches, so the seconds do not include them
        start = clock(batch.base.device)
        inputs = mean_inputs(batch.base, [job.examples for job in batch.jobs], batch.bank.task_adapters)
        k = min(self.k, len(batch.bank))
        weights = []
        for name in batch.bank.device_anchors.names:
            center, gate = gate_of(anchors[name])
            fit = torch.nn.functional.normalize(inputs[name] - center, dim=1) @ gate.T  # (U, N)
            top = fit.topk(k, dim=1)
            shares = torch.softmax(top.values / self.tau, dim=1)
            weights.append(torch.zeros_like(fit).scatter(1, top.indices, shares))
        w = torch.stack(weights, 1).to(batch.base.master_dtype)  # (U, L, N)
        ids = torch.arange(len(batch.bank)).expand(len(w), -1)
        return answered(batch, Merge(ids, w), clock(batch.base.device) - start)


def anchor_inputs(batch: TestBatch) -> dict[str, Tensor]:
    """Return the mean input of each adapted module over the items of each anchor, computed once: name -> (N, D)."""
    context = batch.context
    if "anchor inputs" not in context.kept:
        people = [anchor.latest(ITEMS_PER_ANCHOR) for anchor in context.anchors]
        jobs = [shots_of(context.base, context.bank.task, person).examples for person in people]
        context.kept["anchor inputs"] = mean_inputs(context.base, jobs, context.bank.task_adapters)
    inputs: dict[str, Tensor] = context.kept["anchor inputs"]
    return inputs


@torch.inference_mode()
def mean_inputs(
    base: BaseModel, jobs: Sequence[Sequence[Example]], adapters: Sequence[Adapters], rows_per_batch: int = 16
) -> dict[str, Tensor]:
    """Return the mean input of each adapted module over all tokens of a job's examples: name -> (U, D)."""
    rows = sorted(((u, torch.tensor(e.tokens)) for u, job in enumerate(jobs) for e in job), key=lambda row: len(row[1]))
    sums = {name: torch.zeros(len(jobs), d, dtype=torch.float64) for name, (d, _) in base.targets.items()}
    counts = torch.zeros(len(jobs), 1, dtype=torch.float64)

    def add(name: str, owner: Tensor, mask: Tensor, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].view(*mask.shape, -1)
        total = (x * mask[..., None].to(x)).to(base.master_dtype).sum(1)
        sums[name].index_add_(0, owner, total.cpu().double())  # there: some devices have no float64

    for start in range(0, len(rows), rows_per_batch):
        people, texts = zip(*rows[start : start + rows_per_batch])
        owner = torch.tensor(people)
        tokens = pad_sequence(list(texts), batch_first=True, padding_value=base.pad_token).to(base.device)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True).to(base.device)
        counts.index_add_(0, owner, mask.sum(1, keepdim=True).cpu().double())
        with applied(base.model, adapters, owner), ExitStack() as hooks:
            for name in sums:
                module = base.model.get_submodule(name)
                hooks.enter_context(module.register_forward_pre_hook(partial(add, name, owner, mask)))
            base.model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)  # without logits
    return {name: total / counts for name, total in sums.items()}


def gate_of(means: Tensor) -> tuple[Tensor, Tensor]:
    """Return the center (D,) of the anchors' mean inputs (N, D), and each anchor's direction from the center (N, D)."""
    center = means.mean(0)
    return center, torch.nn.functional.normalize(means - center, dim=1)


class Prime(Method):
    """CMA-ES over the coefficients of the ``k`` nearest anchors; each person has ``budget`` evaluations of the shots.

    All people take their steps together, so an evaluation is one pass for all. Coefficients stay in [-1.5, 1.5].
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2503.18008"
    seeded: ClassVar[bool] = True
    method: Literal["prime"] = "prime"
    name: str = "PriME-style"
    k: int = 3
    budget: int = 10
    bound: float = 1.5
    sigma: float = 0.3

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        require("lab", "cma")
        import cma

        settings = MergeSettings(policy="uniform", k=min(self.k, len(batch.bank)))
        begun, seconds = batch.merge(settings, seed)
        start = clock(batch.base.device)
        options = {"bounds": [-self.bound, self.bound], "verbose": -9, "seed": np.nan}
        searches = [
            cma.CMAEvolutionStrategy(w, self.sigma, options | {"randn": _normal_draws(seed, job.key)})
            for w, job in zip(begun.w.tolist(), batch.jobs)
        ]
        best, least = begun.w.clone(), self._losses(batch, begun, settings)
        evaluations = 1
        while evaluations < self.budget:
            candidates = np.stack([search.ask() for search in searches], axis=1)  # (candidates, U, K)
            losses = []
            for w in torch.from_numpy(candidates[: self.budget - evaluations]).to(begun.w):
                tried = self._losses(batch, Merge(begun.ids, w), settings)
                better = tried < least
                best[better], least[better] = w[better], tried[better]
                losses.append(tried)
            evaluations += len(losses)
            if len(losses) == len(candidates):  # otherwise the budget is spent
                for search, asked, scores in zip(searches, candidates.swapaxes(0, 1), torch.stack(losses, 1).tolist()):
                    search.tell(list(asked), scores)
        return answered(batch, Merge(begun.ids, best), seconds + clock(batch.base.device) - start)

    @staticmethod
    def _losses(batch: TestBatch, merge: Merge, settings: MergeSettings) -> Tensor:
        """Return the loss of each person's shots under their merge, (U,)."""
        logliks = list[Tensor]()
        plan = batch.plan(1, settings)
        for cohort in plan.cohorts:
            adapters = [*batch.bank.task_adapters, *merge_adapters(batch.bank, merge.select(cohort))]
            examples = [batch.jobs[u].examples for u in cohort]
            logliks += log_likelihood(batch.base, examples, adapters, tokens_per_batch=plan.tokens_per_batch)
        return torch.stack([-scores.sum() for scores in logliks])


def _normal_draws(seed: int, person: str) -> Callable[..., npt.NDArray[np.float64]]:
    """Return normal draws that depend on the seed and the person only; the library shares one source by default."""
    digest = hashlib.sha256(f"{seed}/{person}".encode()).digest()
    source = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return lambda *shape: source.standard_normal(shape)
