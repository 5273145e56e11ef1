"""Stage 1: the anchors of a bank, ours together against PEFT one at a time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.speed import data
from benchmarks.speed.adaptation import against_peer, of_its_best, trained
from benchmarks.speed.peers import FREE, peer
from benchmarks.speed.processor import best_dtype
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Row, turns
from benchmarks.speed.training import Cohort, agreed, base_of, oppu, task_lora
from mta.config import Training, parse_size
from mta.lora.batch import fresh

ITEMS, BATCH, STEPS = 24, 8, 3
_MINUTE = 60


def rows(settings: Settings) -> Iterator[Row]:
    """One row, in the faster dtype of this processor."""
    name = "bank building"
    if settings.wanted(name):
        yield building(name, best_dtype(), settings)
        base_of.cache_clear()
        gc.collect()


def building(name: str, dtype: str, settings: Settings) -> Row:
    """16 anchors of 24 items over a frozen task LoRA: three steps of eight. Raises Unequal."""
    anchors, peers = max(settings.people // 2, 2), 2
    cohort = bank_of(dtype, anchors, settings)
    shorter = replace(cohort, jobs=[replace(job, examples=job.examples[:BATCH]) for job in cohort.jobs])
    theirs = cohort.typical(peers)

    def ours() -> float:
        cohort.train()
        return _MINUTE * anchors

    with peer(dtype, cohort.start) as plain:
        precision = of_its_best(plain, theirs, dtype)
        difference = agreed(against_peer(shorter, plain), dtype)
        plain.prepare(theirs.jobs, theirs.start, theirs.training)
        replace(cohort, training=cohort.training.model_copy(update={"steps": 1})).train()
        rates, peer_rates = turns(ours, lambda: trained(plain, theirs, cohort), settings.repeats, warm=False)
    return Row(
        name,
        f"mta {dtype}, {anchors} anchors",
        f"PEFT {dtype}, one by one ({peers})",
        "anchors/min",
        tuple(rates),
        tuple(peer_rates),
        None,
        difference,
        "losses and gradients of two anchors",
        "; ".join([f"short prompts, {ITEMS} items an anchor, {STEPS} steps of {BATCH}", *precision, FREE]),
        more={"anchors": anchors, "peer_anchors": peers, "steps": STEPS},
    )


def bank_of(dtype: str, anchors: int, settings: Settings) -> Cohort:
    """Anchors to be trained; all start from the same A, as a bank's do."""
    base = base_of(dtype)
    training = Training(lr=2e-4, steps=STEPS, batch_size=BATCH)
    cohort = oppu(base, data.short().jobs(base, anchors, ITEMS), training, parse_size(settings.memory))
    start = fresh(base.targets, cohort.start.rank, cohort.start.scale, 0, ["bank"] * anchors, base.master_dtype)
    return replace(cohort, start=start, pooled=task_lora(base))
