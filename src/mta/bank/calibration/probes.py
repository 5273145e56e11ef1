"""The passes of a calibration as pieces of work, computed in this process or in a worker of a cluster."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from mta.bank.calibration.info import one_step
from mta.bank.worker import BankOpener, BankWorker
from mta.config import Lora, Run
from mta.data.tasks.prompt import Example
from mta.distributed.executor import Piece
from mta.lora.batch import LoraBatch, fresh
from mta.lora.layers import Adapters, Gated, PerPerson, Shared
from mta.model.base import BaseModel
from mta.training.gates import gate_gradients
from mta.training.packing import TOKENS
from mta.training.scoring import log_likelihood
from mta.training.trainer import Job, train_loras

Kind = Literal["gradients", "sums", "scores", "stacks", "labels"]
# In forward passes over ``examples``; all labels of an item share its prompt.
COSTS: dict[Kind, int] = {"gradients": 3, "sums": 3, "scores": 1, "stacks": 3, "labels": 2}


@dataclass(frozen=True, slots=True)
class Probe(Piece):
    """Work on some people's examples over their merges, whose coefficients are ``w`` (U, N).

    Its result is, by kind,

    gradients   (examples of all people, N + 1): gradient of each single example in w, and its log-likelihood
    sums        (U, N + 1): the same, summed over each person's examples
    scores      (U,): log-likelihood of each person's examples
    stacks      (U, rates): log-likelihood of each person's ``queries`` after one step of a LoRA at each of ``rates``
    labels      (examples of all people,): log-likelihood of each single example; ``labels`` of them are of one item

    A LoRA has the shape ``lora``, or that of a stack. Coefficients of no anchors (U, 0) are no merge.

    All results are float64. Probes are never split: a calibration needs all its people.
    """

    name: str
    kind: Kind
    examples: tuple[tuple[Example, ...], ...]
    w: Tensor
    queries: tuple[tuple[Example, ...], ...] = ()
    rates: tuple[float, ...] = ()
    lora: Lora | None = None
    labels: int = 1

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def asked(self) -> str:
        """A hash of the question: an interrupted calibration takes over the answers to the same questions only."""
        tokens = [[example.tokens for example in one] for one in (*self.examples, *self.queries)]
        return hashlib.sha256(repr((self.kind, tokens, self.w.tolist(), self.rates, self.lora)).encode()).hexdigest()

    @property
    def cost(self) -> int:
        """The cost in forward passes of one example."""
        return COSTS[self.kind] * sum(map(len, self.examples)) // self.labels + len(self.rates) * sum(
            map(len, self.queries)
        )


@dataclass(frozen=True)
class CalibrationWorker:
    """The models to measure with, and the settings of the run, which have the shape of a stack."""

    base: BaseModel
    anchors: LoraBatch  # on the base's device, in its dtype
    task_lora: LoraBatch | None
    run: Run
    tokens_per_batch: int = TOKENS

    @property
    def task_adapters(self) -> list[Shared]:
        return [Shared(self.task_lora)] if self.task_lora else []

    @cached_property
    def opener(self) -> partial[CalibrationWorker]:
        """What opens the same worker in another process."""
        bank = BankWorker(self.base, self.run, self.task_lora).opener
        return partial(_opened, bank, self.anchors.to(torch.device("cpu")), self.tokens_per_batch)

    def gradients(self, piece: Probe) -> Tensor:
        people = [u for u, examples in enumerate(piece.examples) for _ in examples]
        jobs = [Job(str(i), [example]) for i, example in enumerate(itertools.chain(*piece.examples))]
        return self._gradients(jobs, piece.w[people])

    def sums(self, piece: Probe) -> Tensor:
        return self._gradients([Job(str(i), examples) for i, examples in enumerate(piece.examples)], piece.w)

    def _gradients(self, jobs: Sequence[Job], w: Tensor) -> Tensor:
        at, tokens = w.to(self.base.master_dtype), self.tokens_per_batch
        gates = gate_gradients(self.base, jobs, self.anchors, at, self.task_adapters, tokens_per_batch=tokens)
        return torch.cat([gates.gradients, gates.loglik[:, None]], dim=1)

    def scores(self, piece: Probe) -> Tensor:
        points, owners = torch.unique(piece.w, dim=0, return_inverse=True)  # at one point, a question is asked once
        found = self._scored(piece.examples, self._merge(points), owners.tolist())
        return torch.stack([scores.sum() for scores in found])

    def stacks(self, piece: Probe) -> Tensor:
        # The first step of AdamW moves B by the rate and leaves A: other rates are other scales of the same stack.
        base, lora, merge, rate = self.base, piece.lora or self.run.stack.lora, self._merge(piece.w), max(piece.rates)
        jobs = [Job(key_of(examples), examples) for examples in piece.examples]
        start = fresh(base.targets, lora.rank, lora.scale, 0, [job.key for job in jobs], base.master_dtype)
        frozen, tokens = [*self.task_adapters, *merge], self.tokens_per_batch
        trained = train_loras(base, jobs, start, one_step(rate), frozen=frozen, tokens_per_batch=tokens)
        scaled = [replace(trained, scale=trained.scale * one / rate) for one in piece.rates]
        scored = [self._scored(piece.queries, [*merge, PerPerson(stack)]) for stack in scaled]
        return torch.stack([torch.stack([own.sum() for own in each]) for each in scored], dim=1)

    def labels(self, piece: Probe) -> Tensor:
        return torch.cat(self._scored(piece.examples, self._merge(piece.w)))

    def _merge(self, w: Tensor) -> list[Adapters]:
        w = w.to(self.base.device, self.base.master_dtype)
        return [Gated(self.anchors, w)] if w.shape[1] else []

    def _scored(
        self, examples: Sequence[Sequence[Example]], over: Sequence[Adapters], owners: Sequence[int] | None = None
    ) -> list[Tensor]:
        adapters, tokens = [*self.task_adapters, *over], self.tokens_per_batch
        loglik = log_likelihood(self.base, examples, adapters, owners=owners, tokens_per_batch=tokens)
        return [scores.double() for scores in loglik]


def _opened(bank: BankOpener, anchors: LoraBatch, tokens_per_batch: int) -> CalibrationWorker:
    """Open a worker in another process. Raises BankMismatch for another base, and load errors."""
    worker = bank()
    working = anchors.to(worker.base.device, worker.base.dtype)
    return CalibrationWorker(worker.base, working, worker.task_lora, worker.run, tokens_per_batch)


def key_of(examples: Sequence[Example]) -> str:
    """Return the key of a person's job, which decides where their stack starts."""
    return hashlib.sha256(repr([example.tokens for example in examples]).encode()).hexdigest()


def run_probe(worker: CalibrationWorker, piece: Probe) -> Tensor:
    """Return the result of a piece of work."""
    result: Tensor = getattr(worker, piece.kind)(piece)
    return result
