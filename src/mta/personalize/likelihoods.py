"""What a person's few shots say about the anchors: the likelihood of their answers under each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.lora.batch import LoraBatch, join
from mta.lora.layers import Adapters, Shared
from mta.model.base import BaseModel
from mta.system.progress import OnStep, Step
from mta.training.scoring import log_likelihood
from mta.training.trainer import Job


@dataclass(frozen=True, slots=True)
class Labels:
    """Log probability of every label of every shot, under the pooled model and under each anchor.

    Shapes: scores (U, M, C, 1 + N), pooled model first; gold (U, M) label numbers, -1 where a person has fewer shots.
    """

    scores: Tensor
    gold: Tensor


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the shots say about the anchors, shot by shot.

    Shapes: shots (U, M, 1 + N), log-likelihood of a shot's target under the task LoRA alone and under each anchor;
    counts (U, M), target tokens it is summed over. Both are 0 where a person has fewer shots. ``labels`` only where
    answers are a closed set.
    """

    shots: Tensor
    counts: Tensor
    labels: Labels | None = None

    @property
    def anchors(self) -> Tensor:
        """(U, N): log-likelihood of all shots of a person under each anchor."""
        return self.shots[:, :, 1:].sum(1)

    @property
    def task(self) -> Tensor:
        """(U,): the same under the task LoRA alone."""
        return self.shots[:, :, 0].sum(1)

    @property
    def tokens(self) -> Tensor:
        """(U,): target tokens of all shots of a person."""
        return self.counts.sum(1)

    def kept(self, people: Sequence[int], shots: Sequence[Sequence[int]]) -> Evidence:
        """Row i is what only ``shots[i]`` of person ``people[i]`` say: as if they had no others."""
        mask = torch.zeros(len(people), self.counts.shape[1], dtype=torch.bool)
        for row, numbers in enumerate(shots):
            mask[row, list(numbers)] = True
        rows = list(people)
        labels = self.labels
        if labels is not None:
            labels = Labels(labels.scores[rows], labels.gold[rows].masked_fill(~mask, -1))
        return Evidence(self.shots[rows] * mask[..., None], self.counts[rows] * mask, labels)

    def among(self, anchors: Sequence[int]) -> Evidence:
        """The same for a bank that holds only these ``anchors``."""
        columns = [0, *(n + 1 for n in anchors)]
        labels = self.labels and Labels(self.labels.scores[..., columns], self.labels.gold)
        return Evidence(self.shots[..., columns], self.counts, labels)


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
    counts = _padded([torch.tensor([len(e.target) for e in job.examples], dtype=torch.float64) for job in jobs])
    return Evidence(_golds(labels) if labels else _padded(scores), counts, labels)


def surprise(
    base: BaseModel, jobs: Sequence[Job], adapters: Sequence[Adapters], *, tokens_per_batch: int = 2048
) -> list[float]:
    """Mean NLL per target token of everybody's shots, in nats: one pass, over the right answers alone (our choice)."""
    asked = [job.examples for job in jobs]
    found = log_likelihood(base, asked, adapters, tokens_per_batch=tokens_per_batch)
    return [-float(scores.double().sum()) / targets_of(job) for job, scores in zip(jobs, found)]


def targets_of(job: Job) -> int:
    """Target tokens of all of a person's shots."""
    return sum(len(example.target) for example in job.examples)


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different lengths (M, ...) as one table (U, M, ...), zeros at their ends."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _labels(jobs: Sequence[Job], scores: Sequence[Tensor]) -> Labels:
    most, kinds = max(len(job.examples) for job in jobs), len(jobs[0].alternatives[0])
    table = torch.zeros(len(jobs), most, kinds, scores[0].shape[-1], dtype=torch.float64)
    gold = torch.full((len(jobs), most), -1)
    for u, (job, theirs) in enumerate(zip(jobs, scores)):
        table[u, : len(job.examples)] = theirs.view(len(job.examples), kinds, -1)
        for m, (example, labels) in enumerate(zip(job.examples, job.alternatives)):
            gold[u, m] = [label.target for label in labels].index(example.target)
    return Labels(table, gold)


def _golds(labels: Labels) -> Tensor:
    """(U, M, 1 + N): log probability of the right label of each shot."""
    there = (labels.gold >= 0)[..., None]
    index = labels.gold.clamp_min(0)[..., None, None].expand(*labels.gold.shape, 1, labels.scores.shape[-1])
    return labels.scores.gather(2, index)[:, :, 0] * there
