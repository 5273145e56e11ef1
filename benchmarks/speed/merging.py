"""Stage 2's merges of many people against PEFT's ``add_weighted_adapter``."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.speed.adapters import ManyPeft, plain_model
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Row, rate
from benchmarks.speed.training import ANCHORS, K, agreed, base_of, small
from mta.lora.batch import LoraBatch, Shapes, fresh
from mta.lora.merge import truncate
from mta.personalize.merge import Merge, merge_loras

PEOPLE = 256
_CHUNK = 16  # people whose merges are made at once, used, and let go, as those of a cohort are
_RANK = 8
_MODES = {"cat": "exact", "svd": "svd"}
_TARGETS = {"cat": 50.0, "svd": 20.0}
_HOW: Mapping[str, dict[str, Any]] = {
    "cat": {"combination_type": "cat"},
    "svd": {"combination_type": "svd", "svd_rank": _RANK, "svd_full_matrices": False},  # its fastest
}


@dataclass(frozen=True, slots=True)
class Work:
    """Merges of K anchors of ``bank`` for people, ``exact`` or cut by ``svd``. Shapes: merge.ids and merge.w (U, K)."""

    bank: LoraBatch
    merge: Merge
    mode: str

    @classmethod
    def of(cls, bank: LoraBatch, people: int, mode: str) -> Work:
        """Anchors and coefficients drawn at random."""
        draw = torch.Generator().manual_seed(2)
        ids = torch.stack([torch.randperm(len(bank), generator=draw)[:K] for _ in range(people)])
        return cls(bank, Merge(ids, torch.rand(ids.shape, generator=draw)), mode)

    def first(self, people: int) -> Work:
        """The same for fewer people."""
        return replace(self, merge=self.merge.select(range(people)))

    def chunks(self) -> Iterator[LoraBatch]:
        """Everybody's merges, a few people at a time."""
        people = len(self.merge.ids)
        for start in range(0, people, _CHUNK):
            some = self.merge.select(range(start, min(start + _CHUNK, people)))
            merges = merge_loras(self.bank, some)
            yield truncate(merges, _RANK)[0] if self.mode == "svd" else merges

    def run(self) -> float:
        """All of them; returns how many people."""
        for merges in self.chunks():
            del merges  # before the next are made, as a cohort's are gone when the next one begins
        return len(self.merge.ids)


def rows(settings: Settings) -> Iterator[Row]:
    """Exact against "cat", and svd against "svd"."""
    names = {kind: f"merging, {mode} against PEFT {kind}" for kind, mode in _MODES.items()}
    if not any(map(settings.wanted, names.values())):
        return
    bank = bank_of(base_of("float32").targets)
    base_of.cache_clear()
    gc.collect()
    for kind, name in names.items():
        if settings.wanted(name):
            yield against_peft(name, kind, bank, settings)
            gc.collect()


def bank_of(shapes: Shapes) -> LoraBatch:
    """50 anchors of rank 8 in the shapes of the base, float32, made up: times do not depend on their values."""
    return small(fresh(shapes, _RANK, 2.0, 1, [f"anchor-{n}" for n in range(ANCHORS)]), 1)


def against_peft(name: str, kind: str, bank: LoraBatch, settings: Settings, model: Any = None) -> Row:
    """Everybody's merges against those of a few people by PEFT, compared first. Raises Unequal.

    ``model`` is the peer's base on the device of the bank; by default SmolLM2-135M.
    """
    people = _people(settings) if settings.full or kind == "cat" else 4 * _CHUNK  # an svd takes long for us too
    work, peers = Work.of(bank, min(people, _people(settings)), _MODES[kind]), _peers(kind, settings)
    theirs = work.first(peers)
    used = torch.unique(theirs.merge.ids)  # PEFT has only these anchors to walk through
    peer = ManyPeft(plain_model("float32") if model is None else model, bank.select(used))
    numbers = torch.searchsorted(used, theirs.merge.ids).tolist()

    def plain(people: int = peers) -> float:
        for n in range(people):
            peer.merge(numbers[n], theirs.merge.w[n].tolist(), f"merge-{n}", **_HOW[kind])
        return people

    plain(1)
    difference = agreed(apart_by_update(next(work.first(1).chunks()), peer.adapter("merge-0")), "float32")
    work.first(min(_CHUNK, len(work.merge.ids))).run()
    rates, peer_rates = [], []
    for _ in range(settings.repeats):
        peer.forget("merge-")  # outside of what is timed
        rates.append(rate(work.run))
        peer_rates.append(rate(plain))
    return Row(
        name,
        f"mta {work.mode}, {len(work.merge.ids)} people",
        f"PEFT {kind}, one by one ({peers})",
        "people/s",
        tuple(rates),
        tuple(peer_rates),
        _TARGETS[kind],
        difference,
        "updates of all layers of one person",
        f"{K} of {ANCHORS} anchors of rank {_RANK} each"
        + "; PEFT without full matrices, its fastest" * (kind == "svd"),
        more={"people": len(work.merge.ids), "peer_people": peers},
    )


def apart_by_update(found: LoraBatch, expected: LoraBatch) -> float:
    """Largest relative difference of the updates B @ A over the layers, both of one person: factors may differ."""
    worst = 0.0
    for name in expected.names:
        ours, theirs = found.delta(name)[0].double(), expected.delta(name)[0].double()
        worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
    return worst


def _people(settings: Settings) -> int:
    return 2 * _CHUNK if settings.quick else PEOPLE


def _peers(kind: str, settings: Settings) -> int:
    """People whom PEFT is timed on: its svd of dense updates takes long."""
    if settings.quick or kind == "svd":
        return 1
    return 4
