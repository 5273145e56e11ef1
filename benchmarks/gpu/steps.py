"""One training step of a shape's people: against PEFT, against the rate of a large product, and its memory."""

from __future__ import annotations

import os
import re
import statistics
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu.site import Site, release
from benchmarks.speed import limit, multi_lora
from benchmarks.speed.adaptation import against_peer, trained
from benchmarks.speed.data import Absent
from benchmarks.speed.peers import FREE, PRECISIONS, TOKENS, PlainPeft, fastest
from benchmarks.speed.timing import Row, rate, turns
from benchmarks.speed.training import Cohort, agreed, apart, oppu, small, stack
from mta.config import Run, Training
from mta.config.schema import OPPU_TRAINING
from mta.kernels.linear import weight_of
from mta.model.base import BaseModel
from mta.model.footprint import ParameterCounts, TextLengths
from mta.tools.cost import ON_GPU, DataSizes, Hardware, costs, hardware
from mta.tools.cost import Shape as CostShape
from mta.training.packing import common_prefix, pack_for
from mta.training.trainer import _passes

Train = Callable[[], Any]
ADAPTERS = {"rank 8 (OPPU)": oppu, "stage 3": stack}
BATCHES = (2, 4, 8)  # examples in one pass of the peer
_MINUTE = 60
_COMPARED = 3  # people of one pass whose results are compared with the peer's
_PLANNED = 0.85, 1.15  # least and most measured bytes over planned bytes
_ONE_PASS = 2**20  # tokens
_KNOWN = {"h100": r"h100.*hbm3", "a100": r"a100", "l4": r"\bl4$", "rtx-4090": r"4090$"}  # in CUDA's names


@dataclass
class Step:
    """One training step of all people together. ``batches`` are tried for the peer after its batch of all examples."""

    site: Site
    name: str
    adapter: str
    jobs: Sequence[Any]
    batches: Sequence[int] = ()
    checkpointed: bool = False  # over a base with gradient checkpointing
    nf4: bool = False  # over a base in 4 bits
    rates: Sequence[float] = ()  # people per minute, once measured
    by_batch: dict[int, float] = field(default_factory=dict)  # the peer's, once measured

    @cached_property
    def cohort(self) -> Cohort:
        """The people with their adapters, on the device at the first use."""
        site, base = self.site, self.site.base
        if self.checkpointed or self.nf4:
            base = site.shape.base(site.device, site.dtype, self.checkpointed, self.nf4)
        steps = Training(lr=1e-4, steps=1, batch_size=max(len(job.examples) for job in self.jobs))
        how = {} if self.adapter == "rank 8 (OPPU)" else {"bank": site.bank}
        return ADAPTERS[self.adapter](base, self.jobs, steps, site.memory, **how)

    def against_peft(self) -> Row:
        """Time the step against PEFT, after losses and gradients were compared."""
        site, settings, cohort, jobs = self.site, self.site.settings, self.cohort, self.jobs
        plain = PlainPeft(site.plain(), cohort.start.select([0]))
        some = cohort.typical(min(4, len(jobs)))
        plain.tokens = max(sum(len(e.tokens) for e in job.examples) for job in jobs)  # memory may halve these
        work = some.jobs[:1], some.start, some.training
        precision = fastest(plain, lambda: fitted(plain, lambda: plain.prepare(*work)), PRECISIONS)
        difference = compared(site, cohort, plain)
        fitted(plain, lambda: plain.prepare(some.jobs, some.start, some.training))

        def ours() -> float:
            cohort.train()
            return _MINUTE * len(jobs)

        free, peer = [FREE] if cohort.pooled else [], partial(trained, plain, some, cohort)
        self.rates, peer_rates = turns(ours, peer, settings.repeats, warm=not settings.quick)
        more = {
            "people": len(jobs),
            "peer_tokens_per_pass": plain.tokens,
            "tokens_per_person": cohort.tokens // len(jobs),
        }
        self.by_batch = rates_by_batch(plain, some, cohort, self.batches, settings.repeats)
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
            "; ".join([*free, f"PEFT: {precision}, the faster of {' and '.join(PRECISIONS)}"]),
            more=more,
        )

    def over_four_bits(self) -> Row:
        """The same step over a base in 4 bits, in turn with plain weights. Raises Absent."""
        if find_spec("bitsandbytes") is None:
            raise Absent("bitsandbytes is not installed")
        name, count, other = f"{self.name}, NF4", len(self.jobs), replace(self, nf4=True).cohort
        if not other.base.blocked:
            raise RuntimeError("the base in 4 bits did not pass the check for rows that share a prefix")
        apart = max(_apart(other.base, self.site.base, layer) for layer in other.base.targets)
        note = f"restored weights are {apart:.1%} from the plain ones at most"
        sides = f"mta over NF4, {count} people", "mta over bfloat16"
        return self._in_turn(name, sides, other.train, self.cohort.train, note=note)

    def in_one_kernel(self) -> Row:
        """The same step with flex attention, in turn with blocks, after gradients were compared. Raises Absent."""
        name, count = f"{self.name}, flex attention", len(self.jobs)
        if self.site.device.type == "cpu":
            return Row(name, "mta", "mta, blocks", skipped="flex attention has no backward pass on a CPU")
        headers = Path(sysconfig.get_paths()["include"], "Python.h")
        if not (headers.exists() and any(map(which, (os.environ.get("CC", ""), "gcc", "clang")))):
            raise Absent("flex attention needs a C compiler and Python's headers")
        base, some = self.cohort.base, self.cohort.first(_COMPARED)
        some = replace(some, start=small(some.start, 7))

        def attending(flexible: bool, work: Callable[[], Any]) -> Any:
            with patch.object(base, "flexible", flexible):
                return work()

        (_, one), (_, other) = (attending(flexible, some.gradient) for flexible in (True, False))
        difference = agreed(apart(one, other), str(self.site.dtype).removeprefix("torch."))
        sides, train = (f"mta, {count} people", "mta, blocks"), self.cohort.train
        ours, peer = (partial(attending, flexible, train) for flexible in (True, False))
        return self._in_turn(name, sides, ours, peer, difference=difference, compared="gradients of a few people")

    def _in_turn(self, name: str, sides: tuple[str, str], ours: Train, peer: Train, **about: Any) -> Row:
        def timed(train: Train) -> float:
            train()
            return _MINUTE * len(self.jobs)

        settings = self.site.settings
        one, other = turns(lambda: timed(ours), lambda: timed(peer), settings.repeats, warm=not settings.quick)
        return Row(name, *sides, "people/min", tuple(one), tuple(other), **about)

    def against_estimate(self) -> Row:
        """The same rates against what ``mta size`` estimates from the rate of a large product."""
        self._need_rates()
        site, example = self.site, self.jobs[0].examples[0]
        shared = common_prefix(*(job.tokens for job in self.jobs[0].examples[:2]))
        data = DataSizes(len(example.tokens), len(example.target), len(self.jobs[0].examples), shared=shared)
        run = Run.model_validate({"task_lora": {"enabled": False}, "bank": {"lora": {"rank": 8}}})
        shape = CostShape.of_model(site.shape.name, site.base.model)
        steps = OPPU_TRAINING.steps_for(data.shots)
        operations = costs(shape, run, data)["OPPU"].person_operations / steps
        gpu = torch.cuda.get_device_name(site.device).lower() if site.device.type == "cuda" else ""
        known = next((name for name, sign in _KNOWN.items() if re.search(sign, gpu)), None)
        measured = Hardware("torch.mm here", rate(self._product()[1]), ON_GPU, "measured")
        machine = hardware(known) if known else measured
        note = f"the estimate assumes {machine.share:.0%} of the rate of {machine.name}"
        estimate = (_MINUTE / machine.seconds(operations),)
        found = (statistics.median(self.rates),)
        return Row(f"{self.name}, estimate", "measured", "mta size", "people/min", found, estimate, note=note)

    def against_moe_peft(self) -> Row:
        """Against another trainer of many LoRAs, after losses and gradients were compared. Raises Absent."""
        multi_lora.need_peer()
        site, dtype = self.site, str(self.site.dtype).removeprefix("torch.")
        cohort = replace(self.cohort, memory=self.cohort.memory // 2)  # two processes share the device
        return multi_lora.against(f"{self.name}, MoE-PEFT", cohort, dtype, site.settings, site.plain)

    def against_best_batch(self) -> Row:
        """The same rates against the peer's best number of examples in one pass."""
        self._need_rates()
        size = max(self.by_batch, key=lambda n: self.by_batch[n])
        return Row(
            f"{self.name}, best batch of PEFT",
            f"mta, {len(self.jobs)} people",
            f"PEFT, one by one, {size} examples in a pass",
            "people/min",
            (statistics.median(self.rates),),
            (self.by_batch[size],),
            note=f"tried: {', '.join(map(str, self.by_batch))} examples in a pass, after the turns and not in turn",
            more={"peer_rates_by_batch": self.by_batch},
        )

    def share_of_peak(self) -> Row:
        """Operations that a step cannot do without per second, against a product of large squares."""
        self._need_rates()
        each = limit.needed(self.cohort) / (_MINUTE * len(self.jobs))
        size, product = self._product()
        ours, peers = tuple(each * one for one in self.rates), tuple(rate(product) for _ in self.rates)
        return Row(f"{self.name}, operations", "mta", f"torch.mm of {size} x {size}", "operations/s", ours, peers)

    def _product(self) -> tuple[int, Callable[[], float]]:
        """The size of a large product, and the product, once done."""
        quick = self.site.settings.quick
        size = 512 if quick else 8192
        product = limit.squares(self.site.dtype, 1 if quick else 50, self.site.device, size)
        product()
        return size, product

    def memory(self) -> Row:
        """Peak of the memory of one person in one pass, against the plan."""
        what = "memory with gradient checkpointing" if self.checkpointed else "memory"
        return self._memory(what, lambda: (self.cohort.first(1), _ONE_PASS))

    def memory_of_a_cohort(self) -> Row:
        """Peak of the memory of as many people as are planned together, in the planned passes, against the plan."""

        def whole() -> tuple[Cohort, int]:
            plan = self.cohort.plan()
            return self.cohort.some(plan.cohorts[0]), plan.tokens_per_batch

        return self._memory("memory of a cohort", whole)

    def _memory(self, what: str, choose: Callable[[], tuple[Cohort, int]]) -> Row:
        name, device = f"{self.name}, {what}", self.site.device
        if device.type != "cuda":
            return Row(name, "mta", "memory plan", "bytes", skipped=f"the peak is not measured on {device.type}")
        cohort, tokens = choose()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        torch.cuda.reset_peak_memory_stats()
        cohort.train(tokens_per_batch=tokens)
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
        planned, (least, most) = planned_bytes(cohort, tokens), _PLANNED
        met = "met" if least <= peak / planned <= most else "missed"
        note = f"{len(cohort.jobs)} people; ratio: measured / planned; target {least} to {most}: {met}"
        return Row(name, "measured", "planned", "bytes", (float(peak),), (float(planned),), note=note)

    def _need_rates(self) -> None:
        if not self.rates:
            raise RuntimeError(f"the row {self.name!r} was not measured")


def compared(site: Site, cohort: Cohort, plain: PlainPeft) -> float:
    """Return the largest difference of losses and gradients to the peer's. Raises Unequal."""
    tokens = plain.tokens
    difference = fitted(plain, lambda: against_peer(cohort, plain, _COMPARED))
    plain.unfolded.clear()  # a copy of the weights, which is not used again
    release(site.device)
    plain.tokens = tokens  # the comparison holds more beside a pass than what is timed
    return agreed(difference, str(site.dtype).removeprefix("torch."))


def _apart(base: BaseModel, plain: BaseModel, name: str) -> float:
    """Return the relative distance of a layer's weights."""
    one, other = (weight_of(at.model.get_submodule(name)).float() for at in (base, plain))
    return float((one - other).norm() / other.norm())


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


def rates_by_batch(
    plain: PlainPeft, some: Cohort, cohort: Cohort, sizes: Sequence[int], repeats: int
) -> dict[int, float]:
    """Return the peer's median rate with so many examples in one pass, for the sizes that fit."""
    tokens, longest = plain.tokens, max(len(example.tokens) for job in some.jobs for example in job.examples)
    found = dict[int, float]()
    for size in sizes:
        if size * longest <= tokens:
            plain.tokens = size * longest
            trained(plain, some, cohort)  # the first pass of a shape is slower
            found[size] = statistics.median(rate(lambda: trained(plain, some, cohort)) for _ in range(repeats))
    plain.tokens = tokens
    return found


def planned_bytes(cohort: Cohort, tokens_per_batch: int) -> int:
    """Return the bytes that training a cohort without frozen adapters should take: its largest pass, and parameters.

    In float32, each parameter has a value, a gradient, two moments, and a copy of its start.
    """
    base, jobs = cohort.base, cohort.jobs
    rows = [pack_for(base, job.examples, tokens_per_batch) for job in jobs]
    width = sum(map(sum, base.targets.values())) * cohort.start.rank
    examples = [example.tokens for job in jobs for example in job.examples]
    texts = TextLengths(max(map(len, examples)), common_prefix(*(job.tokens for job in jobs[0].examples[:2])))
    passes = [
        base.footprint.training(
            len(part.rows) * max(len(row.tokens) for row in part.rows),
            sum(row.logit_count for row in part.rows),
            part.people.stop - part.people.start,
            texts,
            ParameterCounts(width),
        )
        for part in _passes(rows, tokens_per_batch, base.footprint.target_weight)
    ]
    return max(passes) + 5 * 4 * width * len(jobs)
