"""What a person's few shots say about the anchors: the likelihood of their answers under each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mta.base import BaseModel
from mta.history import Person
from mta.lora.batch import LoraBatch, join
from mta.lora.layers import Shared
from mta.score import log_likelihood
from mta.tasks.task import Task
from mta.training.trainer import Job, OnStep, Step


@dataclass(frozen=True, slots=True)
class Labels:
    """Log probability of every label of every shot, under the pooled model and under each anchor.

    Shapes: scores (U, M, C, 1 + N), pooled model first; gold (U, M) label numbers, -1 where a person has fewer shots.
    """

    scores: Tensor
    gold: Tensor


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the shots say about the anchors.

    Shapes: anchors (U, N) and task (U,), log-likelihood of a person's targets under each anchor and under the task LoRA
    alone; tokens (U,) target tokens they were summed over. ``labels`` only where answers are a closed set.
    """

    anchors: Tensor
    task: Tensor
    tokens: Tensor
    labels: Labels | None = None


def shots_of(base: BaseModel, task: Task, person: Person) -> Job:
    """A person's items as training examples, each with its alternatives where the task has labels.

    The job's key is the digest of the items, not the id: what starts from a hash of it cannot confirm a guessed id.
    """
    examples = [base.prompts.example(task, item) for item in person.items]
    labels = [task.labels_of(item) for item in person.items]
    if not all(labels):
        return Job(person.digest(), examples)
    pairs = zip(person.items, labels)
    return Job(person.digest(), examples, [base.prompts.examples(task, item, theirs or ()) for item, theirs in pairs])


def gather_evidence(
    base: BaseModel,
    jobs: Sequence[Job],
    bank: LoraBatch,
    pooled: Sequence[Shared],
    *,
    tokens_per_batch: int = 2048,
    on_step: OnStep | None = None,
) -> Evidence:
    """Score everybody's shots under ``pooled`` (the task LoRA) alone and under every anchor: N + 1 passes.

    Anchors never saw a target's shots, so their likelihood is honest evidence. Labels share their shot's prompt, so all
    of them cost little more than the right one.
    """
    labelled = all(job.alternatives for job in jobs)
    asked = [[e for labels in job.alternatives for e in labels] if labelled else job.examples for job in jobs]
    passes, total = len(bank) + 1, sum(len(job.examples) for job in jobs)
    found: list[list[Tensor]] = []
    for number in range(passes):
        parts = [shared.batch for shared in pooled] + ([bank.select([number - 1])] if number else [])
        adapters = [Shared(join(parts))] if parts else []  # one term a layer: fewer passes over the activations
        found.append(log_likelihood(base, asked, adapters, tokens_per_batch=tokens_per_batch))
        if on_step:
            on_step("evidence", Step(number + 1, len(jobs), (number + 1) * total, passes * total))
    scores = [torch.stack(columns, -1).double() for columns in zip(*found)]  # person by person (examples, 1 + N)
    labels = _labels(jobs, scores) if labelled else None
    sums = torch.stack([s.sum(0) for s in scores]) if labels is None else _gold_sums(labels)
    tokens = torch.tensor([sum(len(e.target) for e in job.examples) for job in jobs], dtype=torch.float64)
    return Evidence(sums[:, 1:], sums[:, 0], tokens, labels)


def _labels(jobs: Sequence[Job], scores: Sequence[Tensor]) -> Labels:
    most, kinds = max(len(job.examples) for job in jobs), len(jobs[0].alternatives[0])
    table = torch.zeros(len(jobs), most, kinds, scores[0].shape[-1], dtype=torch.float64)
    gold = torch.full((len(jobs), most), -1)
    for u, (job, theirs) in enumerate(zip(jobs, scores)):
        table[u, : len(job.examples)] = theirs.view(len(job.examples), kinds, -1)
        for m, (example, labels) in enumerate(zip(job.examples, job.alternatives)):
            gold[u, m] = [label.target for label in labels].index(example.target)
    return Labels(table, gold)


def _gold_sums(labels: Labels) -> Tensor:
    """(U, 1 + N): summed log probability of the right labels."""
    there = (labels.gold >= 0)[..., None]
    index = labels.gold.clamp_min(0)[..., None, None].expand(*labels.gold.shape, 1, labels.scores.shape[-1])
    return (labels.scores.gather(2, index)[:, :, 0] * there).sum(1)
