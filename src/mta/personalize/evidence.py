"""Evidence: the likelihood of people's shots under the pooled model and under each anchor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mta.lora.batch import LoraBatch, join
from mta.lora.layers import Shared
from mta.model.base import BaseModel
from mta.personalize.shots import ShotsJob
from mta.system.progress import OnStep, Step
from mta.training.scoring import log_likelihood


@dataclass(frozen=True, slots=True)
class Labels:
    """Log probability of every label of every shot, under the pooled model and under each anchor.

    Shapes: scores (U, M, C, 1 + N), pooled model first; gold (U, M) label numbers, -1 for missing shots.
    """

    scores: Tensor
    gold: Tensor


@dataclass(frozen=True, slots=True)
class Evidence:
    """The likelihood of each shot under each anchor.

    Shapes: loglik (U, M, 1 + N), log-likelihood of a shot's target under the pooled model and under each anchor;
    counts (U, M), number of target tokens. Both are 0 for missing shots. ``labels`` is None for free-text answers.
    """

    loglik: Tensor
    counts: Tensor
    labels: Labels | None = None

    @property
    def anchor_loglik(self) -> Tensor:
        """Log-likelihood of all shots of a person under each anchor, (U, N)."""
        return self.loglik[:, :, 1:].sum(1)

    @property
    def pooled_loglik(self) -> Tensor:
        """Log-likelihood of all shots of a person under the pooled model, (U,)."""
        return self.loglik[:, :, 0].sum(1)

    @property
    def tokens(self) -> Tensor:
        """Target tokens of all shots of a person, (U,)."""
        return self.counts.sum(1)

    def of_shots(self, people: Sequence[int], shots: Sequence[Sequence[int]]) -> Evidence:
        """Return evidence whose row i is of person ``people[i]``, as if they had only ``shots[i]``."""
        mask = torch.zeros(len(people), self.counts.shape[1], dtype=torch.bool)
        for row, numbers in enumerate(shots):
            mask[row, list(numbers)] = True
        rows, labels = list(people), self.labels
        if labels:
            labels = Labels(labels.scores[rows], labels.gold[rows].masked_fill(~mask, -1))
        return Evidence(self.loglik[rows] * mask[..., None], self.counts[rows] * mask, labels)


def gather_evidence(
    base: BaseModel,
    jobs: Sequence[ShotsJob],
    anchors: LoraBatch,
    task_adapters: Sequence[Shared],
    *,
    tokens_per_batch: int | None = None,
    memory: int | None = None,
    on_step: OnStep | None = None,
) -> Evidence:
    """Score all shots under the pooled model and under every anchor: N + 1 passes of ``log_likelihood``.

    The anchors were not trained on these shots, so the likelihoods are unbiased.
    """
    labeled = all(job.alternatives for job in jobs)
    scored = [[e for labels in job.alternatives for e in labels] if labeled else job.examples for job in jobs]
    passes, total = len(anchors) + 1, sum(len(job.examples) for job in jobs)
    by_pass: list[list[Tensor]] = []
    for number in range(passes):
        parts = [shared.batch for shared in task_adapters] + ([anchors.select([number - 1])] if number else [])
        adapters = [Shared(join(parts))] if parts else []  # one term per layer: fewer passes over the activations
        by_pass.append(log_likelihood(base, scored, adapters, tokens_per_batch=tokens_per_batch, memory=memory))
        if on_step:
            on_step("evidence", Step(number + 1, len(jobs), (number + 1) * total, passes * total))
    scores = [torch.stack(columns, -1).double() for columns in zip(*by_pass)]  # one (examples, 1 + N) for each person
    labels = _labels(jobs, scores) if labeled else None
    counts = [torch.tensor([len(e.target) for e in job.examples], dtype=torch.float64) for job in jobs]
    loglik = _golds(labels) if labels else pad_sequence(scores, batch_first=True)
    return Evidence(loglik, pad_sequence(counts, batch_first=True), labels)


def _labels(jobs: Sequence[ShotsJob], scores: Sequence[Tensor]) -> Labels:
    most, kinds = max(len(job.examples) for job in jobs), len(jobs[0].alternatives[0])
    table = torch.zeros(len(jobs), most, kinds, scores[0].shape[-1], dtype=torch.float64)
    gold = torch.full((len(jobs), most), -1)
    for u, (job, own) in enumerate(zip(jobs, scores)):
        table[u, : len(job.examples)] = own.view(len(job.examples), kinds, -1)
        for m, (example, labels) in enumerate(zip(job.examples, job.alternatives)):
            gold[u, m] = [label.target for label in labels].index(example.target)
    return Labels(table, gold)


def _golds(labels: Labels) -> Tensor:
    """Return the log probability of each shot's right label, (U, M, 1 + N)."""
    real = (labels.gold >= 0)[..., None]  # False for missing shots
    index = labels.gold.clamp_min(0)[..., None, None].expand(*labels.gold.shape, 1, labels.scores.shape[-1])
    return labels.scores.gather(2, index)[:, :, 0] * real
