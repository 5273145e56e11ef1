"""The rows of one shape: each is checked for equal results, then timed against a named peer in turn."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from benchmarks.gpu.shapes import Shape, jobs_of, prompts_of
from benchmarks.speed import coefficients, decoding, limit, merging
from benchmarks.speed.adaptation import against_peer, trained
from benchmarks.speed.peers import FREE, PlainPeft
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Row, rate, turns
from benchmarks.speed.training import ANCHORS, Cohort, agreed, oppu, random_bank, small, stack
from mta.config import Training
from mta.lora.batch import LoraBatch, fresh
from mta.model.base import BaseModel
from mta.model.footprint import Numbers, Texts
from mta.training.packing import pack_for

PARTS = ("training", "coefficients", "merging", "decoding", "curve")
SHOTS = 8
LENGTHS = {70: 35, 315: 60}  # tokens of an example -> how many of them all examples of a task share
CURVE = (64, 256, 1024, 4096, 8192)  # tokens of one person
_PIECE = 512  # tokens of an example of the curve, at most
_MINUTE = 60
_ADAPTERS = {"rank 8 (OPPU)": oppu, "stage 3": stack}
_LARGE = ("Llama-3.2-1B", "Llama-3-8B")
_TARGET = 5.0  # of short examples on the 8B shape


@dataclass
class Site:
    """A shape on a device, with its budget in bytes and the sizes of a run."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    memory: int
    settings: Settings

    @cached_property
    def base(self) -> BaseModel:
        """Our model, loaded at the first use."""
        return self.shape.base(self.device, self.dtype)

    def plain(self) -> Any:
        """The same weights as transformers has them, for the peer."""
        return self.shape.model(self.device, self.dtype)

    @cached_property
    def bank(self) -> LoraBatch:
        """50 random anchors of rank 8 on the device."""
        return random_bank(self.base, 4 if self.settings.quick else ANCHORS)

    def name(self, *parts: str) -> str:
        """The name of a row."""
        return ", ".join([self.shape.name, *parts])


def rows(site: Site, part: str) -> Iterator[Row]:
    """All rows of a part."""
    made = {
        "training": training,
        "coefficients": stage_2,
        "merging": merges,
        "decoding": decode,
        "curve": curve,
    }[part]
    try:
        yield from made(site)
    finally:
        release(site.device)


def release(device: torch.device) -> None:
    """Give the memory of what is gone back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def training(site: Site) -> Iterator[Row]:
    """OPPU and stage 3 against PEFT one by one; each with its share of the GEMM peak, and memory against the plan."""
    for tokens, shared in LENGTHS.items():
        for adapter in _ADAPTERS:
            people = site.settings.people if tokens < 100 else min(site.settings.people, 8)
            jobs = jobs_of(site.shape, people, SHOTS, tokens, shared)
            name = site.name(adapter, f"{SHOTS} shots of {tokens} tokens")
            target = _TARGET if (site.shape.name, tokens) == ("Llama-3-8B", 70) else None
            yield from _trained(site, name, adapter, jobs, target)


def curve(site: Site) -> Iterator[Row]:
    """The speed-up by tokens per person: where does one person alone saturate the device?"""
    if site.shape.name not in _LARGE:
        return
    for tokens in CURVE[:2] if site.settings.quick else CURVE:
        each = min(tokens, _PIECE)
        people = max(2, min(site.settings.people, 16384 // tokens))
        jobs = jobs_of(site.shape, people, tokens // each, each, 0, targets=each // 2)
        yield next(_trained(site, site.name("rank 8 (OPPU)", f"{tokens} tokens a person"), "rank 8 (OPPU)", jobs))


def _trained(site: Site, name: str, adapter: str, jobs: list[Any], target: float | None = None) -> Iterator[Row]:
    """Time one step of all people together against PEFT, after losses and gradients were compared."""
    settings, base = site.settings, site.base
    steps = Training(lr=1e-4, steps=1, batch_size=max(len(job.examples) for job in jobs))
    release(site.device)
    how = {} if adapter == "rank 8 (OPPU)" else {"bank": site.bank}
    cohort = _ADAPTERS[adapter](base, jobs, steps, site.memory, **how)
    plain = PlainPeft(site.plain(), cohort.start.select([0]))
    difference = agreed(against_peer(cohort, plain, 1), str(site.dtype).removeprefix("torch."))
    plain.unfolded.clear()  # a second copy of the weights, which is not used again
    some = cohort.typical(min(4, len(jobs)))
    plain.prepare(some.jobs, some.start, some.training)

    def ours() -> float:
        cohort.train()
        return _MINUTE * len(jobs)

    rates, peer_rates = turns(ours, lambda: trained(plain, some, cohort), settings.repeats, warm=not settings.quick)
    yield Row(
        name,
        f"mta, {len(jobs)} people",
        f"PEFT, one by one ({len(some.jobs)})",
        "people/min",
        tuple(rates),
        tuple(peer_rates),
        target,
        difference,
        "losses and gradients of one person",
        FREE if cohort.pooled else "",
        more={
            "people": len(jobs),
            "tokens_per_person": cohort.tokens // len(jobs),
            "blocked": base.blocked,
            "packable": base.packable,
        },
    )
    if adapter == "rank 8 (OPPU)":
        yield _share_of_peak(site, f"{name}, operations", cohort, rates)
        yield _memory(site, f"{name}, memory", cohort)


def _share_of_peak(site: Site, name: str, cohort: Cohort, rates: list[float]) -> Row:
    """Operations that a step cannot do without per second, from its ``rates``, against a product of large squares."""
    each = limit.needed(cohort) / (_MINUTE * len(cohort.jobs))
    size = 512 if site.settings.quick else 8192
    product = limit.squares(site.dtype, 1 if site.settings.quick else 50, site.device, size)
    product()
    ours, peers = tuple(each * one for one in rates), tuple(rate(product) for _ in rates)
    return Row(name, "mta", f"torch.mm of {size} x {size}", "operations/s", ours, peers)


def _memory(site: Site, name: str, cohort: Cohort) -> Row:
    """Measured over planned bytes of training one person in one pass, beside what was there before."""
    if site.device.type != "cuda":
        return Row(name, "mta", "memory plan", "bytes", skipped=f"the peak is not measured on {site.device.type}")
    one = cohort.first(1)
    base, jobs = one.base, one.jobs
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    one.train(tokens_per_batch=2**20)
    peak = torch.cuda.max_memory_allocated() - before
    rows = [row for job in jobs for row in pack_for(base, job.examples, 2**30)]
    tokens = len(rows) * max(len(row.tokens) for row in rows)
    texts = Texts(max(len(e.tokens) for job in jobs for e in job.examples), 0)
    width = sum(map(sum, base.targets.values())) * cohort.start.rank
    passes = base.footprint.training(tokens, sum(row.places for row in rows), len(jobs), texts, Numbers(width))
    planned = passes + 16 * width * len(jobs)  # parameters, gradients, and moments in float32
    note = "ratio: measured / planned; the target is 0.85 to 1.15"
    return Row(name, "measured", "planned", "bytes", (float(peak),), (float(planned),), note=note)


def stage_2(site: Site) -> Iterator[Row]:
    """Coefficients of 50 anchors from one gradient, against scoring the shots under every anchor."""
    jobs = jobs_of(site.shape, min(site.settings.people, 8), SHOTS, 70, LENGTHS[70])  # scoring takes 51 passes
    name = site.name(f"coefficients of {len(site.bank)} anchors")
    yield coefficients.against_scoring(name, site.base, jobs, site.bank, site.settings, f"{site.memory}")


def merges(site: Site) -> Iterator[Row]:
    """Exact merges of many people against PEFT's ``cat``."""
    if site.shape.name != "Llama-3.2-1B":  # PEFT needs the whole base in float32 for it
        return
    bank = site.bank.to(torch.float32)
    name = site.name("exact merge against PEFT cat")
    plain = site.shape.model(site.device, torch.float32)
    yield merging.against_peft(name, "cat", bank, site.settings, plain)


def decode(site: Site) -> Iterator[Row]:
    """Answers for 64 people in one batch, against the base alone and PEFT's mixed batches."""
    people = 4 if site.settings.quick else 64
    adapters = small(fresh(site.base.targets, 8, 16.0, 5, ["person"] * people).to(site.device), 5).to(site.dtype)
    prompts = prompts_of(site.shape, people, decoding.PROMPT)
    work = decoding.Work(site.base, prompts, adapters, site.plain)
    peer = "the base alone"
    yield decoding.against(site.name(f"decoding against {peer}"), peer, work, decoding.Alone(work), site.settings)
    if site.shape.name not in _LARGE:
        return
    # PEFT computes one adapter after the other at each layer: with 64 people, this row would take half an hour.
    few = decoding.Work(site.base, prompts[:16], adapters.select(slice(0, 16)), site.plain, new=8)
    peer, once = "PEFT adapter_names", replace(site.settings, repeats=1)
    yield decoding.against(site.name(f"decoding against {peer}"), peer, few, decoding.Mixed(few), once)


def gemm_rate(device: torch.device, dtype: torch.dtype, quick: bool) -> float:
    """Operations per second of a large product."""
    product = limit.squares(dtype, 1 if quick else 50, device, 512 if quick else 8192)
    product()
    return max(rate(partial(product)) for _ in range(2))
