"""The rows of one shape: mta and a named peer, timed in turn.

Rows against PEFT and the base alone compare results first; coefficients, operations, and memory compare none.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.shapes import Shape, jobs_of, prompts_of
from benchmarks.speed import coefficients, decoding, limit, merging, record
from benchmarks.speed.adaptation import against_peer, trained
from benchmarks.speed.peers import FREE, TOKENS, PlainPeft
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Row, rate, turns
from benchmarks.speed.training import ANCHORS, Cohort, agreed, oppu, random_bank, small, stack
from mta.config import Training
from mta.lora.batch import LoraBatch, fresh
from mta.model.base import BaseModel
from mta.model.footprint import ParameterCounts, TextLengths
from mta.training.packing import pack_for

SHOTS = 8
LENGTHS = {70: 35, 315: 60}  # tokens of an example -> how many of them all examples of a task share
CURVE = (64, 256, 1024, 4096, 8192)  # tokens of one person
_PIECE = 512  # tokens of an example of the curve, at most
_MINUTE = 60
_COMPARED = 3  # people of one pass whose results are compared with the peer's
_ADAPTERS = {"rank 8 (OPPU)": oppu, "stage 3": stack}
_LARGE = ("Llama-3.2-1B", "Llama-3-8B")
_FASTER = 5.0  # than PEFT one by one, for short examples on the 8B shape
_OF_THE_BASE = 0.85  # of the base's rate, for answers of 64 people
_NOT_BLOCKED = f"{record.FAILED}the base did not pass the check for rows that share a prefix (mta.model.agreement)"
_PLANNED = 0.85, 1.15  # least and most measured bytes over planned bytes


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
        """Random anchors of rank 8 on the device."""
        return random_bank(self.base, self.anchors)

    @property
    def anchors(self) -> int:
        """How many anchors ``bank`` has."""
        return 4 if self.settings.quick else ANCHORS

    def name(self, *parts: str) -> str:
        """The name of a row."""
        return ", ".join([self.shape.name, *parts])


class Planned(NamedTuple):
    """A row that can be measured. Its name is known before, so that a failure has the row's name."""

    name: str
    measure: Callable[[], Row]
    target: float | None = None  # on a GPU: a row of ``benchmarks.speed`` has the target of a CPU


def rows(site: Site, part: str, reason: Callable[[], str] = str) -> Iterator[Row]:
    """All rows of a part. A row that cannot be measured says why, and the others go on.

    ``reason`` is asked before each row: why the row is not measured, or "".
    """
    for name, measure, target in PARTS[part](site):
        if why := reason():
            yield Row(name, "mta", "", skipped=why)
            continue
        row = replace(attempted(name, measure), target=target)
        yield row if row.skipped or site.base.blocked else replace(row, skipped=_NOT_BLOCKED)
        release(site.device)  # only now: the error's traceback held the models


def attempted(name: str, measure: Callable[[], Row]) -> Row:
    """Measure a row; return a row that says how it failed if it raises an error."""
    try:
        return measure()
    except Exception as error:
        traceback.print_exc()
        return Row(name, "mta", "", skipped=f"{record.FAILED}{type(error).__name__}: {error}")


def release(device: torch.device) -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # after some errors, CUDA repeats the error at every later call
            torch.cuda.empty_cache()


def accepted(site: Site) -> Iterator[Planned]:
    """Load the base, and show how its rows may be computed: slower rows would be measured if it failed the check."""
    name = site.name("base")

    def measure() -> Row:
        found = {"blocked": site.base.blocked, "packable": site.base.packable}
        note = ", ".join(f"{what}: {'yes' if is_so else 'no'}" for what, is_so in found.items())
        return Row(name, "mta", "", note=note, more=found)

    yield Planned(name, measure)


def training(site: Site) -> Iterator[Planned]:
    """OPPU and stage 3 against PEFT one by one; for OPPU, also the share of the GEMM peak and the memory."""
    for tokens, shared in LENGTHS.items():
        for adapter in _ADAPTERS:
            people = site.settings.people if tokens < 100 else min(site.settings.people, 8)
            jobs = jobs_of(site.shape, people, SHOTS, tokens, shared)
            name = site.name(adapter, f"{SHOTS} shots of {tokens} tokens")
            target = _FASTER if (site.shape.name, tokens) == ("Llama-3-8B", 70) else None
            step = Step(site, name, adapter, jobs)
            yield Planned(name, step.against_peft, target)
            if adapter == "rank 8 (OPPU)":
                yield Planned(f"{name}, operations", step.share_of_peak)
                yield Planned(f"{name}, memory", step.memory)


def curve(site: Site) -> Iterator[Planned]:
    """The speed-up by tokens per person: where does one person alone saturate the device?"""
    if site.shape.name not in _LARGE:
        return
    for tokens in CURVE[:2] if site.settings.quick else CURVE:
        each = min(tokens, _PIECE)
        people = max(2, min(site.settings.people, 16384 // tokens))
        jobs = jobs_of(site.shape, people, tokens // each, each, 0, targets=each // 2)
        name = site.name("rank 8 (OPPU)", f"{tokens} tokens a person")
        yield Planned(name, Step(site, name, "rank 8 (OPPU)", jobs).against_peft)


@dataclass
class Step:
    """One training step of all people together."""

    site: Site
    name: str
    adapter: str
    jobs: Sequence[Any]
    rates: Sequence[float] = ()  # people per minute, once measured

    @cached_property
    def cohort(self) -> Cohort:
        """The people with their adapters, on the device at the first use."""
        steps = Training(lr=1e-4, steps=1, batch_size=max(len(job.examples) for job in self.jobs))
        how = {} if self.adapter == "rank 8 (OPPU)" else {"bank": self.site.bank}
        return _ADAPTERS[self.adapter](self.site.base, self.jobs, steps, self.site.memory, **how)

    def against_peft(self) -> Row:
        """Time the step against PEFT, after losses and gradients were compared."""
        site, settings, cohort, jobs = self.site, self.site.settings, self.cohort, self.jobs
        plain = PlainPeft(site.plain(), cohort.start.select([0]))
        some = cohort.typical(min(4, len(jobs)))
        if site.device.type == "cuda":
            plain.tokens = cohort.plan().tokens_per_batch  # as many as ours in one pass
        tokens = plain.tokens
        difference = fitted(plain, lambda: against_peer(cohort, plain, _COMPARED))
        agreed(difference, str(site.dtype).removeprefix("torch."))
        plain.unfolded.clear()  # a copy of the weights, which is not used again
        release(site.device)
        plain.tokens = tokens  # the comparison holds more beside a pass than what is timed
        fitted(plain, lambda: plain.prepare(some.jobs, some.start, some.training))

        def ours() -> float:
            cohort.train()
            return _MINUTE * len(jobs)

        warm = not settings.quick
        self.rates, peer_rates = turns(ours, lambda: trained(plain, some, cohort), settings.repeats, warm=warm)
        return Row(
            self.name,
            f"mta, {len(jobs)} people",
            f"PEFT, one by one ({len(some.jobs)})",
            "people/min",
            tuple(self.rates),
            tuple(peer_rates),
            None,
            difference,
            f"losses and gradients of {min(_COMPARED, len(jobs))} people of one pass",
            "; ".join([*([FREE] if cohort.pooled else []), "PEFT's adapters are float32"]),
            more={
                "people": len(jobs),
                "peer_tokens_per_pass": plain.tokens,
                "tokens_per_person": cohort.tokens // len(jobs),
            },
        )

    def share_of_peak(self) -> Row:
        """Operations that a step cannot do without per second, against a product of large squares."""
        if not self.rates:
            raise RuntimeError(f"the row {self.name!r} was not measured")
        return _share_of_peak(self.site, f"{self.name}, operations", self.cohort, self.rates)

    def memory(self) -> Row:
        """Peak of the memory against the plan."""
        return _memory(self.site, f"{self.name}, memory", self.cohort)


def fitted(plain: PlainPeft, work: Callable[[], Any]) -> Any:
    """Return what ``work`` does; halve the peer's passes while they do not fit: a token takes more memory there."""
    while True:
        try:
            return work()
        except torch.OutOfMemoryError:
            if plain.tokens <= TOKENS:
                raise
        plain.tokens = max(plain.tokens // 2, TOKENS)
        release(torch.device(plain.model.device))


def _share_of_peak(site: Site, name: str, cohort: Cohort, rates: Sequence[float]) -> Row:
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
    texts = TextLengths(max(len(e.tokens) for job in jobs for e in job.examples), 0)
    width = sum(map(sum, base.targets.values())) * cohort.start.rank
    passes = base.footprint.training(
        tokens, sum(row.logit_count for row in rows), len(jobs), texts, ParameterCounts(width)
    )
    planned = passes + 16 * width * len(jobs)  # parameters, gradients, and moments in float32
    least, most = _PLANNED
    met = "met" if least <= peak / planned <= most else "missed"
    note = f"ratio: measured / planned; target {least} to {most}: {met}"
    return Row(name, "measured", "planned", "bytes", (float(peak),), (float(planned),), note=note)


def stage_2(site: Site) -> Iterator[Planned]:
    """Coefficients of 50 anchors from one gradient, against scoring the shots under every anchor."""
    name = site.name(f"coefficients of {site.anchors} anchors")

    def measure() -> Row:
        jobs = jobs_of(site.shape, min(site.settings.people, 8), SHOTS, 70, LENGTHS[70])  # scoring takes 51 passes
        return coefficients.against_scoring(name, site.base, jobs, site.bank, site.settings, f"{site.memory}")

    yield Planned(name, measure)


def merges(site: Site) -> Iterator[Planned]:
    """Exact merges of many people against PEFT's ``cat``."""
    if site.shape.name != "Llama-3.2-1B":  # PEFT needs the whole base in float32 for it
        return
    name = site.name("exact merge against PEFT cat")

    def measure() -> Row:
        plain = site.shape.model(site.device, torch.float32)
        return merging.against_peft(name, "cat", site.bank.to(torch.float32), site.settings, plain)

    yield Planned(name, measure)


def decode(site: Site) -> Iterator[Planned]:
    """Answers for 64 people in one batch, against the base alone and PEFT's mixed batches."""
    yield Planned(site.name("decoding against the base alone"), partial(_decoded, site), _OF_THE_BASE)
    if site.shape.name in _LARGE:
        # PEFT computes one adapter after the other at each layer: with 64 people, this row would take half an hour.
        yield Planned(site.name("decoding against PEFT adapter_names"), partial(_decoded, site, mixed=True))


def _decoded(site: Site, mixed: bool = False) -> Row:
    people = 4 if site.settings.quick else 16 if mixed else 64
    adapters = small(fresh(site.base.targets, 8, 16.0, 5, ["person"] * people).to(site.device), 5).to(site.dtype)
    prompts = prompts_of(site.shape, people, decoding.PROMPT)
    work = decoding.Work(site.base, prompts, adapters, site.plain, **({"new": 8} if mixed else {}))
    peer, theirs = ("PEFT adapter_names", decoding.Mixed(work)) if mixed else ("the base alone", decoding.Alone(work))
    settings = replace(site.settings, repeats=1) if mixed else site.settings
    return decoding.against(site.name(f"decoding against {peer}"), peer, work, theirs, settings)


PARTS: dict[str, Callable[[Site], Iterator[Planned]]] = {
    "base": accepted,  # always measured
    "training": training,
    "coefficients": stage_2,
    "merging": merges,
    "decoding": decode,
    "curve": curve,
}


def gemm_rate(device: torch.device, dtype: torch.dtype, quick: bool) -> float:
    """Operations per second of a large product."""
    product = limit.squares(dtype, 1 if quick else 50, device, 512 if quick else 8192)
    product()
    return max(rate(partial(product)) for _ in range(2))
