"""The rows of one shape: mta and a named peer, timed in turn.

All rows but those of operations, memory, estimates, and NF4 compare results first.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.gpu.shapes import jobs_of, prompts_of
from benchmarks.gpu.site import Site, release
from benchmarks.gpu.steps import ADAPTERS, BATCHES, Step
from benchmarks.speed import coefficients, decoding, limit, merging, record
from benchmarks.speed.data import Absent
from benchmarks.speed.timing import Row, rate
from benchmarks.speed.training import small
from mta.lora.batch import fresh

SHOTS = 8
LENGTHS = {70: 35, 315: 60}  # tokens of an example -> how many of them all examples of a task share
CURVE = (64, 256, 1024, 4096, 8192)  # tokens of one person
_PIECE = 512  # tokens of an example of the curve, at most
_WRITTEN = 2e9  # weights of a model that is written to a file for another process, at most
_LARGE = ("Llama-3.2-1B", "Llama-3-8B")
_FASTER = 5.0  # than PEFT one by one, for short examples on the 8B shape
_OF_THE_BASE = 0.85  # of the base's rate, for answers of 64 people
_NOT_BLOCKED = f"{record.FAILED}the base did not pass the check for rows that share a prefix (mta.model.agreement)"


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
    except Absent as absent:
        return Row(name, "mta", "", skipped=str(absent))
    except Exception as error:
        traceback.print_exc()
        return Row(name, "mta", "", skipped=f"{record.FAILED}{type(error).__name__}: {error}")


def accepted(site: Site) -> Iterator[Planned]:
    """Load the base, and show how its rows may be computed: slower rows would be measured if it failed the check."""
    name = site.name("base")

    def measure() -> Row:
        found = {"blocked": site.base.blocked, "packable": site.base.packable}
        note = ", ".join(f"{what}: {'yes' if is_so else 'no'}" for what, is_so in found.items())
        return Row(name, "mta", "", note=note, more=found)

    yield Planned(name, measure)


def training(site: Site) -> Iterator[Planned]:
    """OPPU and stage 3 against PEFT one by one; for OPPU, also other peers, the GEMM peak, and memory."""
    for tokens, shared in LENGTHS.items():
        for adapter in ADAPTERS:
            people = site.settings.people if tokens < 100 else min(site.settings.people, 8)
            jobs = jobs_of(site.shape, people, SHOTS, tokens, shared)
            name = site.name(adapter, f"{SHOTS} shots of {tokens} tokens")
            target = _FASTER if (site.shape.name, tokens) == ("Llama-3-8B", 70) else None
            alone = adapter == "rank 8 (OPPU)"
            step = Step(site, name, adapter, jobs, BATCHES if alone else ())
            yield Planned(name, step.against_peft, target)
            if alone:
                yield Planned(f"{name}, best batch of PEFT", step.against_best_batch)
                yield Planned(f"{name}, operations", step.share_of_peak)
                yield Planned(f"{name}, memory", step.memory)
                yield Planned(f"{name}, memory of a cohort", step.memory_of_a_cohort)
                yield Planned(f"{name}, estimate", step.against_estimate)
                yield Planned(f"{name}, flex attention", step.in_one_kernel)
            if alone and site.shape.name in _LARGE:
                yield Planned(f"{name}, NF4", step.over_four_bits)
            if alone and tokens < 100 and site.shape.parameters < _WRITTEN:
                yield Planned(f"{name}, MoE-PEFT", step.against_moe_peft)
            if alone and tokens > 100 and site.shape.name == "Llama-3-8B":
                # Without a name: a generator's variable would keep this second base while the next row is timed.
                yield Planned(
                    f"{name}, memory with gradient checkpointing",
                    Step(site, name, adapter, jobs, checkpointed=True).memory,
                )


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
        # PEFT computes one adapter after the other at each layer: on the 8B shape, 64 people would take minutes.
        yield Planned(site.name("decoding against PEFT adapter_names"), partial(_decoded, site, mixed=True))


def _decoded(site: Site, mixed: bool = False) -> Row:
    few = mixed and site.shape.name != "Llama-3.2-1B"
    people = 4 if site.settings.quick else 16 if few else 64
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
