"""Who is trained together: fixed by sorted keys and the memory budget, blind to workers and to input order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from mta.base import BaseModel
from mta.errors import MemoryBudgetError
from mta.training.trainer import Job

_COPIES = 6  # values, gradient, two moments, a checkpoint being written, the result
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


def plan_cohorts(
    base: BaseModel,
    jobs: Iterable[Job],
    start: Mapping[str, Tensor] | int,
    memory: int,
    *,
    frozen: int = 0,
    most: int = 256,
    threads: int | None = None,
) -> Plan:
    """Split jobs (already sorted by key) into cohorts that fit into ``memory`` bytes beside the base.

    ``start`` is one person's parameters, or their number; ``frozen`` are the bytes of what is kept of a person and not
    trained, merged factors. Half of the memory is for activations, the rest for adapters, gradients and moments. A
    cohort has ``most`` people at most. ``jobs`` are walked through once and not kept.
    Raises MemoryBudgetError, saying what one person needs.
    """
    numbers = start if isinstance(start, int) else sum(tensor[0].numel() for tensor in start.values())
    person = _COPIES * numbers * base.master_dtype.itemsize + frozen
    count, longest = 0, 1
    for job in jobs:
        count += 1
        longest = max([longest, *(len(example.tokens) - 1 for example in job.examples)])
    tokens = min(max(memory // 2 // base.bytes_per_token, 1), _MOST_TOKENS)
    needed = longest * base.bytes_per_token + person
    if needed > memory:
        raise MemoryBudgetError(
            f"one person needs about {needed / 2**20:.1f} MiB "
            f"(a text of {longest} tokens, {numbers:,} numbers to train); "
            f"the budget is {memory / 2**20:.1f} MiB",
            hint="Raise memory=…, lower max_tokens or the rank.",
        )
    fit = (memory - max(tokens, longest) * base.bytes_per_token) // person
    size = min(max(fit, 1), most)
    cohorts = tuple(tuple(range(i, min(i + size, count))) for i in range(0, count, size))
    return Plan(cohorts, max(tokens, longest), threads or torch.get_num_threads())
