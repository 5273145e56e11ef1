"""How near a training step comes to what the processor multiplies at best."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from benchmarks.speed.adaptation import short_cohort
from benchmarks.speed.data import Absent
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Row, turns
from benchmarks.speed.training import Cohort, base_of
from mta.training.packing import TreeRow, pack_for

SIZE = 4096
_TARGETS = {"float32": 0.75, "bfloat16": 0.50}
_PRODUCTS = {"float32": 6, "bfloat16": 24}  # of one turn: a few seconds


def operations(
    rows: Sequence[TreeRow], shapes: Mapping[str, tuple[int, int]], rank: int, hidden: int, vocabulary: int
) -> int:
    """Operations (multiplications and additions) that one training step of packed rows cannot do without.

    A token of a row needs 2 per frozen parameter on the way forward and 2 for the gradient of its input; of an
    adapter's factors, rank * (D + O) numbers a layer, also 2 for their own gradient: 4 and 6. The LM head takes
    4 * hidden * vocabulary at each distinct place that predicts something. Attention, norms, padding and the optimizer
    count nothing.
    Shapes: layer -> (inputs D, outputs O).
    """
    tokens = sum(len(row.tokens) for row in rows)
    places = sum(len(set(row.sources)) for row in rows)
    frozen = sum(d * o for d, o in shapes.values())
    factors = rank * sum(d + o for d, o in shapes.values())
    return tokens * (4 * frozen + 6 * factors) + places * 4 * hidden * vocabulary


def rows(settings: Settings) -> Iterator[Row]:
    """One row per dtype."""
    for dtype, target in _TARGETS.items():
        name = f"operations against torch.mm, {dtype}"
        if settings.wanted(name):
            try:
                yield limit(name, dtype, target, settings)
            except Absent as absent:
                yield Row(name, "mta", "torch.mm", target=target, skipped=str(absent))
    base_of.cache_clear()
    gc.collect()


def limit(name: str, dtype: str, target: float, settings: Settings) -> Row:
    """The step of rank 8 on short prompts against a product of two squares. Raises Absent."""
    cohort = short_cohort(dtype, settings)
    steps = cohort.training.steps or 1
    work = steps * needed(cohort)

    def ours() -> float:
        cohort.train()
        return work

    product = squares(getattr(torch, dtype), 1 if settings.quick else _PRODUCTS[dtype])
    rates, peer_rates = turns(ours, product, settings.repeats)
    return Row(
        name,
        f"mta, {len(cohort.jobs)} people",
        f"torch.mm of {SIZE} x {SIZE}",
        "operations/s",
        tuple(rates),
        tuple(peer_rates),
        target,
        note="operations a step cannot do without: none of attention, norms, padding, optimizer",
        more={"people": len(cohort.jobs), "steps": steps, "operations": work},
    )


def needed(cohort: Cohort) -> int:
    """Operations of one step of a cohort with all its examples, rows shared as the trainer packs them."""
    base, budget = cohort.base, cohort.plan().tokens_per_batch
    packed = [row for job in cohort.jobs for row in pack_for(base, job.examples, budget)]
    head = base.model.get_output_embeddings().weight
    return operations(packed, base.targets, cohort.start.rank, head.shape[1], head.shape[0])


def squares(
    dtype: torch.dtype, times: int, device: str | torch.device = "cpu", size: int = SIZE
) -> Callable[[], float]:
    """Products of two squares in ``dtype`` into the same place; returns their operations."""
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=draw, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> float:
        for _ in range(times):
            torch.mm(a, b, out=out)
        return 2.0 * size**3 * times

    return product
