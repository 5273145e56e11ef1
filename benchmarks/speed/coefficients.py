"""Stage 2 from one gradient against scoring the shots under every anchor; MTA as shipped against OPPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence

import torch

from benchmarks.speed import data
from benchmarks.speed.data import Absent, Prompts
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Row, turns
from benchmarks.speed.training import agreed, base_of, random_bank, task_lora
from mta.bank.calibration.info import one_step
from mta.config import Lora, Training, parse_size
from mta.lora.batch import LoraBatch
from mta.lora.layers import Adapters, Gated, PerPerson, Shared
from mta.model.base import BaseModel
from mta.model.footprint import ParameterCounts
from mta.personalize.evidence import gather_evidence
from mta.personalize.shots import ShotsJob, shots_of
from mta.personalize.stages import adapt
from mta.training.gates import gate_gradients
from mta.training.plan import plan_cohorts
from mta.training.scoring import mean_nll

DTYPE = "bfloat16"
ANCHORS = (16, 32)
RANK = 8
OPPU_STEPS = 4  # tuned: the exhibit "oppu" of src/mta_lab/recipes
STACK, STEP = Lora(rank=1), one_step(1.6e-3)
_TARGET = 5.0


def rows(settings: Settings) -> Iterator[Row]:
    """Two kinds of prompts: two numbers of anchors against scoring, and MTA against OPPU."""
    for kind, prompts in (("short prompts", data.short), ("reviews", data.reviews)):
        names = {anchors: f"coefficients, {anchors} anchors, {kind}" for anchors in ANCHORS}
        shipped = f"stages 2 and 3 against OPPU, {kind}"
        if not any(map(settings.wanted, [*names.values(), shipped])):
            continue
        try:
            base, found = base_of(DTYPE), prompts()
        except Absent as absent:
            yield from (Row(name, "mta", "", skipped=str(absent)) for name in [*names.values(), shipped])
            continue
        jobs = _jobs(base, found, settings.people if kind == "short prompts" else settings.reviewers)
        for anchors, name in names.items():
            if settings.wanted(name):
                yield against_scoring(name, base, jobs, random_bank(base, anchors), settings)
        if settings.wanted(shipped):
            yield against_oppu(shipped, base, jobs, settings)
    base_of.cache_clear()
    gc.collect()


def against_scoring(
    name: str, base: BaseModel, jobs: Sequence[ShotsJob], bank: LoraBatch, settings: Settings, memory: str = "4GiB"
) -> Row:
    """One forward and one backward pass against N + 1 forward passes, after the likelihoods both give were compared.

    Raises Unequal.
    """
    anchors, pooled = len(bank), [Shared(task_lora(base))]
    at, tokens = torch.zeros(anchors, dtype=torch.float64), _tokens(base, jobs, bank, 1, memory)
    found = gate_gradients(base, jobs, bank, at, pooled, tokens_per_batch=tokens).loglik
    evidence = gather_evidence(base, jobs, bank.select([0]), pooled, tokens_per_batch=tokens)
    expected = evidence.pooled_loglik.double()
    difference = agreed(float(((found - expected) / expected).abs().max()), DTYPE)

    def gradient() -> float:
        gate_gradients(base, jobs, bank, at, pooled, tokens_per_batch=tokens)
        return len(jobs)

    def scored() -> float:
        gather_evidence(base, jobs, bank, pooled, tokens_per_batch=tokens)
        return len(jobs)

    rates, peer_rates = turns(gradient, scored, settings.repeats, warm=not settings.quick)
    return Row(
        name,
        f"one gradient, {len(jobs)} people",
        f"scoring under {anchors} anchors and the task LoRA",
        "people/s",
        tuple(rates),
        tuple(peer_rates),
        _TARGET,
        difference,
        "log-likelihoods of shots under the task LoRA",
        f"{data.SHOTS} shots a person, {DTYPE}, rank {RANK}",
        more={"people": len(jobs), "anchors": anchors},
    )


def against_oppu(name: str, base: BaseModel, jobs: Sequence[ShotsJob], settings: Settings) -> Row:
    """A gradient over 32 anchors, a stack of rank 1 over the merge, and the losses that a state stores, against OPPU.

    OPPU trains a LoRA of rank 8 for each person, and stores no loss. mu is 0: at another mu, the pooled loss takes
    one more forward pass.
    """
    bank, pooled = random_bank(base, ANCHORS[-1]), [Shared(task_lora(base))]
    at = torch.zeros(len(bank), dtype=torch.float64)
    width = base.footprint.sums.width
    tokens = _tokens(base, jobs, bank, width)
    oppu, steps = Lora(), Training(lr=2e-4, steps=OPPU_STEPS, batch_size=64)

    def mta() -> float:
        found = gate_gradients(base, jobs, bank, at, pooled, tokens_per_batch=tokens)
        w = 0.01 * found.gradients.to(base.master_dtype)  # of any size: times do not depend on it
        below: list[Adapters] = [*pooled, Gated(bank, w)]
        stacks = adapt(base, jobs, below, STACK, STEP, tokens_per_batch=tokens)
        mean_nll(base, jobs, [*below, PerPerson(stacks)], tokens_per_batch=tokens)  # the other losses are known
        return len(jobs)

    def alone() -> float:
        adapt(base, jobs, pooled, oppu, steps, tokens_per_batch=tokens)
        return len(jobs)

    rates, peer_rates = turns(mta, alone, settings.repeats, warm=not settings.quick)
    return Row(
        name,
        "MTA: one gradient, one step of rank 1, losses",
        f"OPPU: {OPPU_STEPS} steps of rank {oppu.rank}, {len(jobs)} people together",
        "people/s",
        tuple(rates),
        tuple(peer_rates),
        1.0,
        note=f"{len(bank)} anchors, mu = 0, {data.SHOTS} shots a person, {DTYPE}",
        more={"people": len(jobs), "anchors": len(bank)},
    )


def _jobs(base: BaseModel, prompts: Prompts, people: int) -> list[ShotsJob]:
    able = [person for person in prompts.people if len(person.items) >= data.SHOTS]
    if len(able) < people:
        raise Absent(f"{people} people with {data.SHOTS} items are wanted, {len(able)} are there")
    chosen = [person.first(data.SHOTS) for person in able[:people]]
    return [shots_of(base, prompts.task, person, alternatives=False) for person in chosen]  # only the true answers


def _tokens(base: BaseModel, jobs: Sequence[ShotsJob], bank: LoraBatch, trained: int, memory: str = "4GiB") -> int:
    width = base.footprint.sums.width
    below = ParameterCounts(task_lora=RANK * width, shared=len(bank) * RANK * width)
    return plan_cohorts(base, jobs, trained, parse_size(memory), below=below).tokens_per_batch
