"""One point of a growth curve, measured in a process of its own so that its peak memory is its own.

``python -m benchmarks.speed.point people 16`` prints one line of JSON. Curves: people, anchors, tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed import data
from benchmarks.speed.training import ANCHORS, K, base_of, task_lora
from mta.config import Lora, Training, parse_size
from mta.data.tasks.prompt import Example
from mta.lora.batch import Factors, LoraBatch
from mta.lora.layers import Adapters, PerPerson, Shared
from mta.lora.merge import merge_exact
from mta.model.base import BaseModel
from mta.model.footprint import ParameterCounts
from mta.personalize.evidence import gather_evidence
from mta.personalize.shots import shots_of
from mta.personalize.stages import adapt
from mta.system.malloc import keep_freed_memory
from mta.training.plan import plan_cohorts
from mta.training.trainer import Job

_RANK = 8
_ENOUGH, _MOST = 2.0, 5  # seconds of measuring, and repetitions, after which a point is known well enough


@dataclass(frozen=True, slots=True)
class Site:
    """What every point works with; ``memory`` in bytes bounds a cohort."""

    base: BaseModel
    memory: int
    people: int

    def adapt(self, jobs: Sequence[Job], bank: LoraBatch) -> None:
        """One step of stage 3 for everybody, cohort by cohort as ``mta personalize`` does it: merge, then adapt."""
        base, width = self.base, sum(d + o for d, o in self.base.targets.values())
        below = ParameterCounts(frozen=K * _RANK * width, task_lora=_RANK * width)
        plan = plan_cohorts(base, jobs, width, self.memory, below=below)
        draw = torch.Generator().manual_seed(2)
        ids = torch.stack([torch.randperm(len(bank), generator=draw)[:K] for _ in jobs])
        for members in plan.cohorts:
            self._cohort([jobs[n] for n in members], bank, ids[list(members)], plan.tokens_per_batch)

    def _cohort(self, jobs: Sequence[Job], bank: LoraBatch, ids: Tensor, tokens: int) -> None:
        merges = PerPerson(merge_exact(bank, ids, torch.full(ids.shape, 1 / K)))
        below: list[Adapters] = [Shared(task_lora(self.base)), merges]
        training = Training(lr=1e-4, steps=1, batch_size=data.SHOTS)
        adapt(self.base, jobs, below, Lora(rank=1), training, tokens_per_batch=tokens)


def of_people(site: Site, people: int) -> dict[str, Any]:
    """Stage 3 of that many people on short prompts."""
    bank = bank_of(site.base, ANCHORS)
    jobs = data.short().jobs(site.base, people)
    site.adapt(jobs[:2], bank)
    return measured(lambda: site.adapt(jobs, bank))


def in_turn(site: Site, few: int, many: int, turns: int) -> dict[str, Any]:
    """Stage 3 of few people, of many, of few again, and so on: seconds of each, and the peak of all."""
    bank = bank_of(site.base, ANCHORS)
    jobs = data.short().jobs(site.base, many)
    site.adapt(jobs[:few], bank)
    before = settled()
    order = [few] + [many, few] * turns
    seconds = [timed(lambda people=people: site.adapt(jobs[:people], bank)) for people in order]  # type: ignore[misc]
    return {"before": before, "peak": peak(), "few": seconds[::2], "many": seconds[1::2]}


def of_anchors(site: Site, anchors: int) -> dict[str, Any]:
    """The evidence of a few people's shots about that many anchors, which count as memory too."""
    before, prompts = settled(), data.short()
    bank = bank_of(site.base, anchors)
    jobs = [shots_of(site.base, prompts.task, person.first(data.SHOTS)) for person in prompts.people[: site.people]]
    pooled = [Shared(task_lora(site.base))]
    gather_evidence(site.base, jobs, bank.select([0]), pooled)
    return measured(lambda: gather_evidence(site.base, jobs, bank, pooled)) | {"before": before}


def of_tokens(site: Site, tokens: int) -> dict[str, Any]:
    """Stage 3 of a few people whose examples have that many tokens and share none."""
    bank = bank_of(site.base, ANCHORS)
    jobs = long_jobs(site.base, site.people, tokens)
    site.adapt(jobs[:1], bank)
    return measured(lambda: site.adapt(jobs, bank))


def long_jobs(base: BaseModel, people: int, tokens: int) -> list[Job]:
    """Examples cut from one stream of what people said about movies; the last two tokens are to be learned."""
    stream: list[int] = []
    for person in data.short().people:
        lines = [f"{item.fields['title']} ({item.fields['genres']}): {item.fields['rating']}" for item in person.items]
        stream += base.tokenizer("\n".join(lines), add_special_tokens=False)["input_ids"]
        if len(stream) >= people * data.SHOTS * tokens:
            break
    cuts = [tuple(stream[n * tokens : (n + 1) * tokens]) for n in range(people * data.SHOTS)]
    examples = [Example(cut, tokens - 2) for cut in cuts]
    return [Job(f"person-{n}", examples[n * data.SHOTS : (n + 1) * data.SHOTS]) for n in range(people)]


def bank_of(base: BaseModel, anchors: int) -> LoraBatch:
    """Made-up anchors in the base's dtype, written where they stay: nothing else is ever allocated for them."""
    draw, factors = torch.Generator().manual_seed(1), {}
    for name, (d, o) in base.targets.items():
        a, b = torch.empty(anchors, _RANK, d, dtype=base.dtype), torch.empty(anchors, o, _RANK, dtype=base.dtype)
        factors[name] = Factors(a.uniform_(-(d**-0.5), d**-0.5, generator=draw), b.normal_(0, 0.01, generator=draw))
    return LoraBatch(factors, 2.0)


def measured(work: Callable[[], object]) -> dict[str, Any]:
    """Median seconds of a few runs, and resident bytes before and at the peak."""
    before, seconds = settled(), list[float]()
    while sum(seconds) < _ENOUGH and len(seconds) < _MOST:
        seconds.append(timed(work))
    return {"before": before, "peak": peak(), "seconds": statistics.median(seconds), "runs": len(seconds)}


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def settled() -> int:
    """Resident bytes once what is free was given back; the peak is counted from here on where Linux lets it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS") or peak()


def peak() -> int:
    """Largest resident bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def status(key: str) -> int:
    """Bytes that Linux tells of this process; 0 elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.point", description=__doc__)
    parser.add_argument("curve", choices=("people", "in-turn", "anchors", "tokens"))
    parser.add_argument("x", type=int, nargs="+", help="where on the curve; in-turn: few, many, turns")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--people", type=int, default=2, help="whose shots are used where people are not what grows")
    args = parser.parse_args(words)
    curves: dict[str, Callable[..., dict[str, Any]]] = {
        "people": of_people,
        "in-turn": in_turn,
        "anchors": of_anchors,
        "tokens": of_tokens,
    }
    site = Site(base_of(args.dtype), parse_size(args.memory), args.people)
    print(json.dumps(curves[args.curve](site, *args.x)))


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    main()
