"""Score given answers under a model, for rows of different people in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain, count, islice

import torch
from torch import Tensor

from mta.data.history import Item
from mta.data.tasks.prompt import Example
from mta.data.tasks.task import Task
from mta.lora.layers import Adapters, Shared, applied
from mta.model.base import BaseModel
from mta.model.footprint import ParameterCounts, TextLengths
from mta.system.progress import Step
from mta.training.packing import TOKENS, collate, fitting, pack_for
from mta.training.plan import ON_GPU
from mta.training.trainer import Job


@torch.inference_mode()
def log_likelihood(
    base: BaseModel,
    examples: Sequence[Sequence[Example]],
    adapters: Sequence[Adapters] = (),
    *,
    owners: Sequence[int] | None = None,
    tokens_per_batch: int | None = None,
    memory: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> list[Tensor]:
    """Return the sum of log p over the target tokens of each example: an (n,) tensor for each list of n examples.

    List i is computed with the adapters of owner ``owners[i]`` (default: i; -1: no person), equal examples of an owner
    once. ``tokens_per_batch`` is as in ``train``; by default, passes are as large as is fast on the device, and take at
    most half of ``memory`` bytes. Up to rounding, results do not depend on which lists share a batch.
    """
    if owners is None:  # without anybody's own adapters, all lists are of one owner
        owners = [0] * len(examples) if all(isinstance(one, Shared) for one in adapters) else range(len(examples))
    tokens_per_batch = tokens_per_batch or _tokens_per_batch(base, examples, memory)
    weight = base.footprint.target_weight
    numbers: dict[int, dict[Example, int]] = {owner: {} for owner in owners}
    for owner, part in zip(owners, examples):
        for example in part:
            numbers[owner].setdefault(example, len(numbers[owner]))
    starts = dict(zip(numbers, accumulate(map(len, numbers.values()), initial=0)))
    rows = [(one, row) for one, own in numbers.items() for row in pack_for(base, list(own), tokens_per_batch)]
    rows.sort(key=lambda entry: len(entry[1].tokens))
    sums = torch.zeros(sum(map(len, numbers.values())), dtype=base.master_dtype, device=base.device)
    passes, done = count(1), 0
    while rows:
        # Longest rows first: rows of similar length share a pass, and the pass with the largest memory comes first.
        fit = fitting((row for _, row in reversed(rows)), len(rows[-1][1].tokens), tokens_per_batch, weight)
        rows, chosen = rows[:-fit], rows[-fit:]
        chosen.sort(key=lambda entry: entry[0])
        batch = collate([row for _, row in chosen], base.pad_token, base.device, [starts[one] for one, _ in chosen])
        with applied(base.model, adapters, torch.tensor([one for one, _ in chosen])):
            found = batch.log_probs(batch.logits(base))
        sums.index_add_(0, batch.owner + batch.example, found.to(sums.dtype))
        if on_step:
            done += sum(len(set(row.examples)) for _, row in chosen)
            on_step(Step(next(passes), len(numbers), done, len(sums)))
    sums = sums.cpu()
    return [sums[[starts[one] + numbers[one][e] for e in part]] for one, part in zip(owners, examples)]


def _tokens_per_batch(base: BaseModel, examples: Sequence[Sequence[Example]], memory: int | None) -> int:
    """Return how many tokens a pass takes for which nothing was planned. One text may take more than ``memory``."""
    enough = TOKENS * (1 if base.device.type == "cpu" else ON_GPU)
    if memory is None:
        return enough
    longest = max((len(example.tokens) for part in examples for example in part), default=1)
    footprint, texts, nothing = base.footprint, TextLengths(longest), ParameterCounts()
    token = footprint.scoring(1, 0, 0, texts, nothing)
    target = footprint.scoring(0, 1, 0, texts, nothing) / footprint.target_weight  # which counts more than one token
    return max(min(enough, int(memory / 2 / max(token, target))), 1)


def mean_nll(
    base: BaseModel,
    jobs: Sequence[Job],
    adapters: Sequence[Adapters],
    *,
    tokens_per_batch: int | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> list[float]:
    """Return the mean NLL per target token of each job's examples, in nats: one pass over the right answers only."""
    examples = [job.examples for job in jobs]
    found = log_likelihood(base, examples, adapters, tokens_per_batch=tokens_per_batch, on_step=on_step)
    return [-float(scores.double().sum()) / job.targets for job, scores in zip(jobs, found)]


def label_scores(
    base: BaseModel,
    task: Task,
    queries: Sequence[Sequence[Item]],
    adapters: Sequence[Adapters] = (),
    *,
    owners: Sequence[int] | None = None,
    memory: int | None = None,
    on_examples: Callable[[list[Example]], None] | None = None,
) -> list[Tensor]:
    """Return the log probability of every label for each person's queries: a list of (queries, labels) tensors.

    A label's score is the sum of log p over its tokens and the end token, without length normalization. ``owners`` and
    ``memory`` are as in ``log_likelihood``. ``on_examples`` gets an example of each query, with its first label.
    """
    labels = task.labels or ()
    every = iter(base.prompts.all(task, chain(*queries), labels))
    jobs = [list(chain(*islice(every, len(items)))) for items in queries]
    if on_examples:
        on_examples([example for job in jobs for example in job[:: len(labels)]])
    found = log_likelihood(base, jobs, adapters, owners=owners, memory=memory)
    return [scores.view(-1, len(labels)) for scores in found]
