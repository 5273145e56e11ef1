"""Who is trained together: fixed by sorted keys and the memory budget, blind to workers and to input order."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from mta.errors import MemoryBudgetError
from mta.model.base import BaseModel
from mta.model.footprint import COPIES, Numbers, Texts
from mta.training.packing import common_prefix
from mta.training.trainer import Job

_MOST_TOKENS = 4096  # more per pass gains nothing on the processors measured


@dataclass(frozen=True, slots=True)
class Plan:
    """Cohorts of job numbers (into the sorted keys), and the rows and threads everything is computed with."""

    cohorts: tuple[tuple[int, ...], ...]
    tokens_per_batch: int
    threads: int

    @property
    def digest(self) -> str:
        """Names the plan: a checkpoint made under another plan is not used."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Of the examples of all jobs: how many jobs, the largest and the smallest example with its targets' weight.

    ``share`` is the share of target tokens among all tokens.
    """

    jobs: int
    largest: int
    smallest: int
    texts: Texts
    share: float

    @classmethod
    def of(cls, jobs: Iterable[Job], weight: float) -> _Lengths:
        """Walk through the jobs once and keep none of them."""
        count, longest, largest, smallest, tokens, targets, prefixes = 0, 1, 1, _MOST_TOKENS, 1, 0, list[int]()
        for job in jobs:
            count += 1
            for example in job.examples:
                fed, aims = len(example.tokens) - 1, len(example.target)
                size = fed + math.ceil(weight * aims)
                longest, largest, smallest = max(longest, fed), max(largest, size), min(smallest, size)
                tokens, targets = tokens + fed, targets + aims
            if len(job.examples) > 1:
                prefixes.append(common_prefix(job.examples[0].tokens, job.examples[1].tokens))
        prefix = min(sum(prefixes) // max(len(prefixes), 1), longest)
        return cls(count, largest, max(smallest, 1), Texts(longest, prefix), targets / tokens)


def plan_cohorts(
    base: BaseModel,
    jobs: Iterable[Job],
    start: Mapping[str, Tensor] | int,
    memory: int,
    *,
    below: Numbers | None = None,
    most: int = 256,
    threads: int | None = None,
) -> Plan:
    """Split jobs (already sorted by key) into cohorts that fit into ``memory`` bytes beside the base.

    ``start`` is one person's parameters, or their number; ``below`` are the adapters that are not trained. Half of the
    memory is for activations and logits, the rest for adapters, gradients and moments. A cohort has ``most`` people at
    most. ``jobs`` are walked through once and not kept.
    Raises MemoryBudgetError, saying what one person needs.
    """
    trained = start if isinstance(start, int) else sum(tensor[0].numel() for tensor in start.values())
    numbers, footprint = replace(below or Numbers(), trained=trained), base.footprint
    lengths = _Lengths.of(jobs, footprint.target_weight)
    token = footprint.token(lengths.texts, footprint.ranks(numbers))
    token = max(token, footprint.scoring(1, 0, 0, lengths.texts, Numbers()))  # more only with gradient checkpointing
    person = (COPIES * trained + numbers.frozen) * base.master_dtype.itemsize
    copies, shared = footprint.person(numbers), footprint.shared(numbers)
    needed = lengths.largest * token + person + copies + shared
    if needed > memory:
        raise MemoryBudgetError(
            f"one person needs about {needed / 2**20:.1f} MiB "
            f"(a text of {lengths.texts.longest} tokens, {trained:,} numbers to train); "
            f"the budget is {memory / 2**20:.1f} MiB",
            hint="Raise memory=…, lower max_tokens or the rank.",
        )
    enough = int(_MOST_TOKENS * (1 + footprint.target_weight * lengths.share))
    tokens = min(memory // 2 // token, enough, (memory - person - copies - shared) // token)
    tokens = max(tokens, lengths.largest)
    room, together = memory - tokens * token - shared, tokens // lengths.smallest  # people in one pass, at most
    fit = max(room // (person + copies), (room - together * copies) // person)
    size = min(max(fit, 1), most)
    cohorts = tuple(tuple(range(i, min(i + size, lengths.jobs))) for i in range(0, lengths.jobs, size))
    return Plan(cohorts, tokens, threads or torch.get_num_threads())
