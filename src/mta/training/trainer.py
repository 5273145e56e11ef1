"""The lock-step trainer: train a cohort of adapters over one frozen base, with forward passes for many people.

Each step takes a batch of each person, packs it into rows, runs the rows of as many people as fit into one pass, and
updates all adapters at once. A person's loss is the mean over their target tokens of the step, in any number of rows.
Losses of people are summed, so gradients never mix. People leave the cohort after their last step.
Source: arXiv:2511.20072 stages 1 and 3 train LoRAs one by one; training them together is our choice.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from mta.config import Training
from mta.data.tasks.prompt import Example
from mta.lora.batch import LoraBatch
from mta.lora.layers import Adapters, PerPerson, Renumbered, applied
from mta.model.base import BaseModel
from mta.model.footprint import TextLengths
from mta.system.device import moved
from mta.system.process import give_back_memory
from mta.system.progress import Step
from mta.training.checkpoint import Checkpoint
from mta.training.optimizer import BatchedAdamW, learning_rate
from mta.training.packing import TOKENS, TreeRow, collate, fitting, pack_for


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter to train: ``key`` identifies the adapter, ``examples`` are its training data.

    ``examples_before`` is the number of examples that the adapter was trained on before. ``blocks`` number the block
    of each example: the examples of a block share the beginning of their prompts, and stay together when shuffled.
    """

    key: str
    examples: Sequence[Example]
    examples_before: int = 0
    blocks: Sequence[int] = ()

    @property
    def targets(self) -> int:
        return sum(len(example.target) for example in self.examples)


Build = Callable[[Mapping[str, Tensor], Tensor], Adapters]
"""Maps the parameters of a range of jobs, and the numbers of these jobs (on the CPU), to adapters."""


class Passes(TypedDict, total=False):
    """Keywords of ``train`` that do not change the result: memory, time, and reports."""

    tokens_per_batch: int
    checkpoint: Checkpoint | None
    on_step: Callable[[Step], None] | None
    on_first: Callable[[Tensor], None] | None


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    base: BaseModel,
    jobs: Sequence[Job],
    start: Mapping[str, Tensor],
    adapters: Build,
    training: Training,
    *,
    frozen: Sequence[Adapters] = (),
    seed: int = 0,
    dtype: torch.dtype | None = None,
    tokens_per_batch: int = TOKENS,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[Step], None] | None = None,
    on_first: Callable[[Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """Train parameters ``start`` (each (U, ...), one row per job) over the frozen base and ``frozen`` adapters.

    ``adapters`` maps parameters to adapters of the base: factors to a LoRA, or coefficients to a merge; it gets them in
    ``dtype`` (default: the master dtype). ``frozen`` adapters are indexed by job.
    One pass computes rows of at most ``tokens_per_batch`` padded tokens; a target token counts more, for its logits
    (``Footprint.target_weight``). With a ``checkpoint`` a killed run resumes from the last save; the caller removes it
    after saving the result. ``on_first`` gets the losses of the first step (U,), those of ``start``, also in a
    resumed run; not a number for jobs without a step. Returns the parameters in the order of ``jobs``, in the base's
    master dtype.
    """
    cohort, dtype = _Cohort.begin(base, jobs, start, training), dtype or base.master_dtype
    if checkpoint and (saved := checkpoint.load()):
        cohort.restore(*saved)
    total = sum(training.examples(len(job.examples)) for job in jobs)
    cohort.release()
    whole = dict[int, list[TreeRow]]()  # of jobs with all examples in every batch: packed once

    def rows_of(j: int, step: int) -> list[TreeRow]:
        if j in whole:
            return whole[j]
        examples = batch_of(jobs[j], step, training.batch_size, seed)
        rows = pack_for(base, examples, tokens_per_batch)
        if len(examples) == len(jobs[j].examples):
            whole[j] = rows
        return rows

    while cohort.active:
        with base.in_training():
            rows = [rows_of(j, cohort.step) for j in cohort.active]
            losses = _accumulate(base, cohort, rows, adapters, frozen, dtype, tokens_per_batch)
        first = cohort.active if cohort.step == 0 and (on_first or checkpoint) else []
        cohort.advance(training, sum(min(training.batch_size, len(jobs[j].examples)) for j in cohort.active))
        if first:  # only now: this waits for a GPU
            cohort.first[first] = losses.cpu()
        if on_step:
            on_step(Step(cohort.step, len(rows), cohort.seen, total, float(losses.mean())))
        if checkpoint and (checkpoint.due() or not cohort.active):
            checkpoint.save(*cohort.saved())
    if on_first:
        on_first(cohort.first)
    result = cohort.result()
    del cohort
    buffers = 4 * sum(tensor.nbytes for tensor in result.values())  # values, gradient, two moments
    longest = TextLengths(max((len(example.tokens) for job in jobs for example in job.examples), default=1))
    give_back_memory(keep=int(1.5 * (buffers + tokens_per_batch * base.footprint.token(longest))))
    return result


def train_loras(
    base: BaseModel,
    jobs: Sequence[Job],
    start: LoraBatch,
    training: Training,
    *,
    frozen: Sequence[Adapters] = (),
    seed: int = 0,
    **passes: Unpack[Passes],
) -> LoraBatch:
    """Train adapter u of ``start`` on the examples of job u. Keywords as in ``train``."""

    def per_person(parameters: Mapping[str, Tensor], _: Tensor) -> PerPerson:
        return PerPerson(LoraBatch.of_tensors(parameters, start.scale))

    found = train(base, jobs, start.parts(), per_person, training, frozen=frozen, seed=seed, dtype=base.dtype, **passes)
    return LoraBatch.of_tensors(found, start.scale)


def batch_of(job: Job, step: int, size: int, seed: int) -> list[Example]:
    """Return a job's batch at ``step``: all examples if they fit, else the next ``size`` of hash-seeded shuffles."""
    n = len(job.examples)
    if size >= n:
        return list(job.examples)
    places = range(step * size, (step + 1) * size)
    orders = {epoch: _shuffled(job, f"{seed}/{job.key}/{epoch}") for epoch in {place // n for place in places}}
    return [job.examples[orders[place // n][place % n]] for place in places]


def _shuffled(job: Job, key: str) -> list[int]:
    members: dict[int, list[int]] = {}
    for place, block in enumerate(job.blocks or range(len(job.examples))):
        members.setdefault(block, []).append(place)
    order = list(members.values())
    random.Random(key).shuffle(order)
    return [place for block in order for place in block]


@dataclass(slots=True)
class _Cohort:
    """Parameters in training as one buffer (U, P); layers get views of the buffer."""

    layout: dict[str, tuple[slice, torch.Size]]  # parameter -> its columns and the shape of one row
    steps: list[int]
    sizes: list[tuple[int, int]]  # examples of each job, and those known before
    optimizer: BatchedAdamW
    first: Tensor  # losses of the jobs in the first step
    active: list[int]
    finished: dict[int, Tensor] = field(default_factory=dict)
    step: int = 0
    seen: int = 0  # examples, counted again in each epoch

    @classmethod
    def begin(cls, base: BaseModel, jobs: Sequence[Job], start: Mapping[str, Tensor], training: Training) -> _Cohort:
        layout, width = {}, 0
        for name, tensor in start.items():
            layout[name] = (slice(width, width + tensor[0].numel()), tensor.shape[1:])
            width += tensor[0].numel()
        # Jobs of similar length are neighbors, so that there is little padding.
        order = sorted(range(len(jobs)), key=lambda j: (sum(len(e.tokens) for e in jobs[j].examples), jobs[j].key))
        place = base.device, base.master_dtype  # ordered there: on a GPU, these copies would take longer than a step
        values = torch.cat([tensor.detach().to(*place).flatten(1) for tensor in start.values()], dim=1)
        values = values[moved(base.device, torch.tensor(order, dtype=torch.long))[0]]
        steps = [training.steps_for(len(job.examples)) for job in jobs]
        sizes = [(len(job.examples), job.examples_before) for job in jobs]
        first = torch.full((len(jobs),), math.nan, dtype=base.master_dtype)
        return cls(layout, steps, sizes, BatchedAdamW.of(values), first, order)

    def leaves(self, people: slice, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return trainable views of the buffer, or of a copy of it in ``dtype``, for a slice of people."""
        values = self.optimizer.values[people].to(dtype)
        return {name: view.detach().requires_grad_() for name, view in self.views(values).items()}

    def add_gradient(self, people: slice, leaves: Mapping[str, Tensor], loss: Tensor) -> None:
        """Add the gradient of ``loss`` with respect to ``leaves`` to the buffer."""
        views = self.views(self.optimizer.gradient[people])
        torch._foreach_add_(list(views.values()), list(torch.autograd.grad(loss, list(leaves.values()))))

    def advance(self, training: Training, examples: int) -> None:
        """Take one optimizer step for all active jobs, then release the finished ones."""
        rates = [learning_rate(training, self.step, self.steps[j], *self.sizes[j]) for j in self.active]
        self.optimizer.update(torch.tensor(rates, dtype=torch.float64), training)
        self.step += 1
        self.seen += examples
        self.release()

    def release(self) -> None:
        """Move finished jobs out of the buffer: AdamW would also update parameters with zero gradients."""
        done = [self.steps[j] <= self.step for j in self.active]
        if not any(done):
            return
        self.finished |= {j: self.optimizer.values[i].clone() for i, j in enumerate(self.active) if done[i]}
        kept = [i for i in range(len(done)) if not done[i]]
        self.optimizer.keep(torch.tensor(kept, dtype=torch.long))
        self.active = [self.active[i] for i in kept]

    def result(self) -> dict[str, Tensor]:
        values = torch.stack([self.finished[j] for j in range(len(self.steps))])
        return {name: view.contiguous() for name, view in self.views(values).items()}

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        return {name: buffer[:, columns].view(len(buffer), *shape) for name, (columns, shape) in self.layout.items()}

    def saved(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        tensors = {key: getattr(self.optimizer, key) for key in ("values", "mean", "square", "step")}
        tensors |= {f"finished/{j}": values for j, values in self.finished.items()} | {"first": self.first}
        progress = {"step": self.step, "examples": self.seen, "active": self.active}
        return {k: t.cpu() for k, t in tensors.items()}, progress

    def restore(self, tensors: dict[str, Tensor], progress: dict[str, object]) -> None:
        device = self.optimizer.values.device
        values, mean, square = (tensors[key].to(device) for key in ("values", "mean", "square"))
        self.optimizer = BatchedAdamW(values, torch.zeros_like(values), mean, square, tensors["step"])
        self.finished = {
            int(k.removeprefix("finished/")): t.to(device) for k, t in tensors.items() if k.startswith("finished/")
        }
        self.first = tensors["first"]
        self.active = list(progress["active"])  # type: ignore[call-overload]
        self.step, self.seen = int(progress["step"]), int(progress["examples"])  # type: ignore[call-overload]


@dataclass(frozen=True, slots=True)
class _Pass:
    """Rows of one pass: those of a slice ``people`` of the cohort, or a part of one person's rows."""

    people: slice
    rows: list[TreeRow]
    owners: list[int]  # places in the cohort


def _accumulate(
    base: BaseModel,
    cohort: _Cohort,
    rows: Sequence[Sequence[TreeRow]],
    adapters: Build,
    frozen: Sequence[Adapters],
    dtype: torch.dtype,
    budget: int,
) -> Tensor:
    """Add the gradients of each person's rows to the cohort's buffer; return the losses of its people, (U,)."""
    weight = base.footprint.target_weight
    shares = [1 / max(sum(len(row.targets) for row in own), 1) for own in rows]
    (share,) = moved(base.device, torch.tensor(shares, dtype=base.master_dtype))
    jobs = torch.tensor(cohort.active)
    losses = torch.zeros_like(share)
    for part in _passes(rows, budget, weight):
        batch = collate(part.rows, base.pad_token, base.device, part.owners)
        leaves, numbers = cohort.leaves(part.people, dtype), jobs[part.people]
        layers = [*(Renumbered(one, numbers) for one in frozen), adapters(leaves, numbers)]
        with applied(base.model, layers, torch.tensor(part.owners) - part.people.start):
            # No variable holds the logits, so that only what the backward pass needs stays in memory.
            found = batch.log_probs(batch.logits(base))
            weighted = -found * share[batch.owner]
            cohort.add_gradient(part.people, leaves, weighted.sum())
        losses.index_add_(0, batch.owner, weighted.detach())
    return losses


def _passes(rows: Sequence[Sequence[TreeRow]], budget: int, weight: float) -> Iterator[_Pass]:
    """Yield passes of neighboring people with up to ``budget`` padded tokens; a person with more gets several passes.

    A place that needs logits counts as ``weight`` tokens more.
    """
    first, chosen, owners, width, logits = 0, list[TreeRow](), list[int](), 0, 0
    for person, added in enumerate(rows):
        width = max([width, *(len(row.tokens) for row in added)])
        logits += sum(row.logit_count for row in added)
        if chosen and width * (len(chosen) + len(added)) + weight * logits > budget:
            yield _Pass(slice(first, person), chosen, owners)
            first, chosen, owners = person, [], []
            width = max((len(row.tokens) for row in added), default=0)
            logits = sum(row.logit_count for row in added)
        chosen += added
        owners += [person] * len(added)
        while len(chosen) > 1 and width * len(chosen) + weight * logits > budget:  # one person alone exceeds the budget
            count = fitting(chosen, width, budget, weight)
            yield _Pass(slice(person, person + 1), chosen[:count], owners[:count])
            chosen, owners = chosen[count:], owners[count:]
            width, logits = max(len(row.tokens) for row in chosen), sum(row.logit_count for row in chosen)
    if chosen:
        yield _Pass(slice(first, len(rows)), chosen, owners)


@torch.inference_mode(False)
@torch.enable_grad()
def gradient(
    base: BaseModel,
    jobs: Sequence[Job],
    at: Mapping[str, Tensor],
    adapters: Build,
    *,
    frozen: Sequence[Adapters] = (),
    tokens_per_batch: int = TOKENS,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the gradient of each job's log-likelihood in its parameters, and the log-likelihoods (U,).

    ``at`` holds the parameters, each (U, ...), one row per job; the gradient has their shapes, on the CPU. A job's
    log-likelihood is the sum of log p over the target tokens of all its examples. The cost is one forward and one
    backward pass over all jobs. Other arguments as in ``train``. Source: our choice.
    """
    cohort = _Cohort.begin(base, jobs, at, Training(steps=1))
    rows = [pack_for(base, jobs[j].examples, tokens_per_batch) for j in cohort.active]
    with base.in_training():
        losses = _accumulate(base, cohort, rows, adapters, frozen, base.master_dtype, tokens_per_batch)
    order = torch.tensor(cohort.active).argsort()
    # The trainer's loss is the mean over a person's target tokens.
    counts = [jobs[j].targets for j in cohort.active]
    (targets,) = moved(base.device, torch.tensor(counts, dtype=losses.dtype))
    found = -(cohort.optimizer.gradient * targets[:, None]).cpu()[order]
    return cohort.views(found), -(losses * targets).cpu()[order]
