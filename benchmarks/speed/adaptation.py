"""Few-shot adaptation of many people against PEFT, one person at a time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.speed import data
from benchmarks.speed.data import Absent, Prompts
from benchmarks.speed.peers import AS_IT_COMES, FREE, PRECISIONS, PlainPeft, fastest, peer
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Row, turns
from benchmarks.speed.training import Cohort, agreed, apart, base_of, oppu, small, stack
from mta.config import Training, parse_size

_MINUTE = 60  # people times this, per second, is people per minute
_SHORT = {"float32": "fp32", "bfloat16": "bf16"}
_MADE = {"rank 8 (OPPU)": oppu, "stage 3": stack}


@dataclass(frozen=True, slots=True)
class Case:
    """One headline row: which prompts and adapters, our dtype and the peer's, and what is to be reached."""

    prompts: str
    adapter: str
    dtype: str
    peer_dtype: str
    target: float

    @property
    def name(self) -> str:
        """As the table has it."""
        kinds = dict.fromkeys((_SHORT[self.dtype], _SHORT[self.peer_dtype]))
        return f"adaptation, {self.prompts}, {self.adapter}, {' against '.join(kinds)}"


_TARGETS = {
    ("short", "float32"): 5,
    ("reviews", "float32"): 1.6,
    ("short", "bfloat16"): 7,
    ("reviews", "bfloat16"): 2.5,
}
CASES = [
    *(Case(prompts, made, dtype, dtype, at) for (prompts, dtype), at in _TARGETS.items() for made in _MADE),
    Case("short", "rank 8 (OPPU)", "bfloat16", "float32", 14),
]


def rows(settings: Settings) -> Iterator[Row]:
    """One row for each case."""
    for case in CASES:
        if settings.wanted(case.name):
            try:
                yield headline(case, settings)
            except Absent as absent:
                yield Row(case.name, "mta", "PEFT", target=case.target, skipped=str(absent))
            gc.collect()
    base_of.cache_clear()
    gc.collect()


def headline(case: Case, settings: Settings) -> Row:
    """Our cohort against PEFT, after their losses and gradients were compared. Raises Absent, Unequal."""
    people = settings.people if case.prompts == "short" else settings.reviewers
    cohort = _cohort(case.prompts, case.adapter, case.dtype, people, settings)
    rough = "bfloat16" if "bfloat16" in (case.dtype, case.peer_dtype) else "float32"
    theirs = cohort.typical(_peers(case.prompts, settings, people))

    def ours() -> float:
        cohort.train()
        return _MINUTE * people

    with peer(case.peer_dtype, cohort.start) as plain:
        precision = of_its_best(plain, theirs, case.peer_dtype)
        difference = agreed(against_peer(cohort, plain, 2 if case.prompts == "short" else 1), rough)
        plain.prepare(theirs.jobs, theirs.start, theirs.training)
        cohort.train()  # warm, whole: memory that a process touches first is slow
        rates, peer_rates = turns(ours, lambda: trained(plain, theirs, cohort), settings.repeats, warm=False)
    return Row(
        case.name,
        f"mta {_SHORT[case.dtype]}, {people} people",
        f"PEFT {_SHORT[case.peer_dtype]}, one by one ({len(theirs.jobs)})",
        "people/min",
        tuple(rates),
        tuple(peer_rates),
        case.target,
        difference,
        "losses and gradients",
        "; ".join([_said(settings), *precision, *([FREE] if cohort.pooled else [])]),
        more=_more(cohort, len(theirs.jobs)),
    )


def of_its_best(plain: PlainPeft, some: Cohort, dtype: str) -> list[str]:
    """Let a bfloat16 peer compute with the fastest of its precisions; return what a row says of it."""
    if dtype != "bfloat16":
        return []
    work = some.jobs[:1], some.start, some.training
    return [f"PEFT with {fastest(plain, lambda: plain.prepare(*work), (AS_IT_COMES, *PRECISIONS))}, its fastest"]


def trained(plain: PlainPeft, some: Cohort, cohort: Cohort) -> float:
    """One turn of the peer, prepared for ``some``; returns people of the cohort, times a minute."""
    plain.train()
    return _MINUTE * alike(some, cohort)


def alike(some: Cohort, cohort: Cohort) -> float:
    """How many of the cohort's people, by the length of their texts, some of them make up."""
    return len(cohort.jobs) * some.tokens / cohort.tokens


def against_peer(cohort: Cohort, plain: PlainPeft, people: int = 2) -> float:
    """Largest relative difference of losses and adapters' gradients; leaves the last person's merge folded in.

    Ours computes these people together, as it trains them: the peer's results show whether they get mixed up.
    """
    some = cohort.first(people)
    some = replace(some, start=small(some.start, 7))
    loss, gradients = some.gradient()
    worst, losses = 0.0, []
    for n, one in enumerate(some.each()):
        if one.pooled or one.merges:
            plain.fold(one.pooled, one.merges)
        expected, theirs = plain.gradient(one.jobs, one.start)
        losses.append(expected)
        worst = max(worst, apart(gradients.select([n]), theirs))
    expected = sum(losses) / len(losses)
    return max(worst, abs(loss - expected) / abs(expected))


def _cohort(prompts: str, adapter: str, dtype: str, people: int, settings: Settings) -> Cohort:
    base = base_of(dtype)
    found: Prompts = data.short() if prompts == "short" else data.reviews()
    training = Training(lr=1e-4, steps=settings.steps, batch_size=data.SHOTS)
    return _MADE[adapter](base, found.jobs(base, people), training, parse_size(settings.memory))


def short_cohort(dtype: str, settings: Settings) -> Cohort:
    """The step that is measured most: rank 8 on short prompts. Raises Absent."""
    return _cohort("short", "rank 8 (OPPU)", dtype, settings.people, settings)


def _peers(prompts: str, settings: Settings, people: int) -> int:
    """How many of the people PEFT is timed on."""
    return min(4 if settings.full or prompts == "short" else 1, people)


def _said(settings: Settings) -> str:
    return f"{data.SHOTS} examples a person, {settings.steps} optimizer step{'s' * (settings.steps > 1)}"


def _more(cohort: Cohort, peers: int) -> dict[str, Any]:
    return {
        "people": len(cohort.jobs),
        "peer_people": peers,
        "steps": cohort.training.steps,
        "tokens_per_example": cohort.tokens / sum(len(job.examples) for job in cohort.jobs),
    }
