"""Cut jobs into cohorts that fit the memory. The plan depends on the jobs and their order, not on the workers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import torch

from mta.config import Lora
from mta.errors import MemoryBudgetError
from mta.model.base import BaseModel
from mta.model.footprint import COPIES, Footprint, ParameterCounts, TextLengths
from mta.system.atomic import json_sha256
from mta.training.packing import common_prefix
from mta.training.trainer import Job

_MOST_TOKENS = 4096  # per pass; more were not faster on the processors measured
ON_GPU = 8  # times as many: a GPU waits for the launches of small passes


@dataclass(frozen=True, slots=True)
class Plan:
    """Cohorts of job numbers, and the batch size and threads of all passes."""

    cohorts: tuple[tuple[int, ...], ...]
    tokens_per_batch: int
    threads: int
    shortened: int  # examples whose texts were shortened

    @property
    def digest(self) -> str:
        """Sha256 of the plan; a checkpoint of another plan is not used."""
        values = {name: value for name, value in asdict(self).items() if name != "shortened"}
        return json_sha256(values)


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Number of jobs, and lengths of their examples: ``largest`` and ``smallest`` include the weight of targets."""

    jobs: int
    largest: int
    smallest: int
    texts: TextLengths
    share: float  # of target tokens among all tokens
    most: int  # examples of one job
    shortened: int

    @classmethod
    def of(cls, jobs: Iterable[Job], weight: float) -> _Lengths:
        """Read the jobs once, without keeping them."""
        count, longest, largest, smallest, tokens, targets, prefixes = 0, 1, 1, _MOST_TOKENS, 1, 0, list[int]()
        shortened = most = 0
        for job in jobs:
            most = max(most, len(job.examples))
            count, shortened = count + 1, shortened + sum(example.cut > 0 for example in job.examples)
            for example in job.examples:
                fed, aims = len(example.tokens) - 1, len(example.target)
                size = fed + math.ceil(weight * aims)
                longest, largest, smallest = max(longest, fed), max(largest, size), min(smallest, size)
                tokens, targets = tokens + fed, targets + aims
            if len(job.examples) > 1:
                prefixes.append(common_prefix(job.examples[0].tokens, job.examples[1].tokens))
        prefix = min(sum(prefixes) // max(len(prefixes), 1), longest)
        share = targets / max(tokens, 1)
        return cls(count, largest, max(smallest, 1), TextLengths(longest, prefix), share, most, shortened)


def parameters_of(base: BaseModel, lora: Lora) -> int:
    """Return the number of parameters of one LoRA."""
    return lora.rank * base.footprint.sums.width


def plan_cohorts(
    base: BaseModel,
    jobs: Iterable[Job],
    trained: int,
    memory: int,
    *,
    below: ParameterCounts | None = None,
    most: int = 256,
    threads: int | None = None,
    on_gpu: bool | None = None,
) -> Plan:
    """Cut jobs, in the given order, into cohorts that fit into ``memory`` bytes beside the base.

    ``trained`` is the number of parameters of one person; ``below`` are the frozen adapters. Half of the memory is for
    activations and logits, the rest for adapters, gradients, and moments. ``jobs`` are read once and not kept.
    ``on_gpu`` says whether other processes compute on GPUs; by default, the base's device computes.
    Raises MemoryBudgetError, which says how much one person needs.
    """
    if on_gpu is None:
        on_gpu = base.device.type != "cpu"
    footprint = base.footprint_without_kernels if on_gpu else base.footprint
    numbers = replace(below or ParameterCounts(), trained=trained)
    lengths, threads = _Lengths.of(jobs, footprint.target_weight), threads or torch.get_num_threads()
    if not lengths.jobs:
        return Plan((), 0, threads, 0)
    per_token = _bytes_per_token(footprint, lengths.texts, numbers)
    per_person = (COPIES * trained + numbers.frozen) * base.master_dtype.itemsize
    per_person_in_pass, shared = footprint.person(numbers), footprint.shared(numbers)
    needed = lengths.largest * per_token + per_person + per_person_in_pass + shared
    if needed > memory:
        raise MemoryBudgetError(
            f"one person needs about {needed / 2**20:.1f} MiB "
            f"(a text of {lengths.texts.longest} tokens, {trained:,} numbers to train); "
            f"the budget is {memory / 2**20:.1f} MiB",
            hint="Raise memory=… (of a recipe: run.memory=…), lower max_tokens or the rank.",
        )
    most_tokens = _MOST_TOKENS * (ON_GPU if on_gpu else 1)
    enough = int(most_tokens * (1 + footprint.target_weight * lengths.share))
    for_one = memory - per_person - per_person_in_pass - shared
    tokens = max(min(memory // 2 // per_token, enough, for_one // per_token), lengths.largest)
    for_people, most_in_pass = memory - tokens * per_token - shared, tokens // lengths.smallest  # people, or rows
    copies = 1 if base.packable else lengths.most  # layers may copy a person's adapters for each row
    all_in_pass = for_people // (per_person + copies * per_person_in_pass)
    fit = max(all_in_pass, (for_people - most_in_pass * per_person_in_pass) // per_person)
    size = min(max(fit, 1), most)
    cohorts = tuple(tuple(range(i, min(i + size, lengths.jobs))) for i in range(0, lengths.jobs, size))
    return Plan(cohorts, tokens, threads, lengths.shortened)


def _bytes_per_token(footprint: Footprint, texts: TextLengths, numbers: ParameterCounts) -> int:
    """Return the bytes of the most demanding pass: training, scoring, or one with gradients of gates."""
    training = footprint.token(texts, footprint.ranks(numbers))
    scoring = footprint.scoring(1, 0, 0, texts, ParameterCounts())  # is larger only with gradient checkpointing
    return max(training, scoring, footprint.gate_token(texts, numbers) if numbers.gated else 0)
