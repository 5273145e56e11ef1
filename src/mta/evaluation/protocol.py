"""The protocol: some of a person's items are the shots, later ones the queries, for every method alike."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mta.bank.bank import Bank
from mta.config import MergeSettings, Run, parse_size
from mta.data.bm25 import with_profiles
from mta.data.history import Item, Person
from mta.data.tasks.task import Task
from mta.errors import InputError
from mta.evaluation.kept import load_evidence, save_evidence
from mta.model.base import BaseModel
from mta.model.encoders import Encoder, encode_people
from mta.personalize.likelihoods import Evidence, Shots, gather_evidence, shots_of
from mta.personalize.merge import Merge, fit_merge, frozen_numbers, needs_evidence
from mta.system.progress import OnStep
from mta.training.plan import Plan, plan_cohorts

log = logging.getLogger("mta")
Ask = Literal["next", "last"]


def shots_and_queries(
    task: Task, person: Person, shots: int, queries: int, ask: Ask
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """A person's few items, and what is asked of them. Raises InputError if they have too few.

    ``next``: the first items are the shots; asked are a benchmark's own queries if there are any, else the items right
    after. ``last``: asked are the last items in time, own queries among them, whatever the number of shots, which are
    the items right before; where queries are unlike the history (LaMP-1, LaMP-7) only they are asked.
    Source: docs/decisions/005.
    """
    own = tuple(query for query in person.queries if task.has_target(query))
    if ask == "next":
        return person.items[:shots], own[-queries:] or person.after(shots, queries)
    if not task.asks_as_items:
        return person.items[-shots:], own[-queries:]
    timeline = (*person.items, *own)
    if len(timeline) < shots + queries:
        raise InputError(
            f"a person has {len(timeline)} items; {shots} shots and {queries} queries were asked for",
            hint=f"Lower shots= or queries=, or leave out whoever has fewer than {shots + queries} items.",
        )
    return timeline[-queries - shots : -queries], timeline[-queries:]


def able(task: Task, person: Person, shots: int, queries: int, ask: Ask) -> bool:
    """Whether a person has as many shots and queries as the protocol wants."""
    own = sum(task.has_target(query) for query in person.queries)
    if ask == "next":
        return len(person.items) >= shots + queries or own > 0
    if not task.asks_as_items:
        return len(person.items) >= shots and own > 0
    return len(person.items) + own >= shots + queries


def apart(bank: Bank, people: Sequence[Person]) -> tuple[list[Person], list[Person]]:
    """Return the people a bank was built from, and those who share no item with them and can be tested on it."""
    members = [person for person in people if bank.info.members.artefacts_of(person.id)]
    ids, groups = {person.id for person in members}, {person.group for person in members if person.group}
    strangers = [person for person in people if person.id not in ids and person.group not in groups]
    if connected := len(people) - len(members) - len(strangers):
        log.warning("%d people are left out, because they share items with people in the bank", connected)
    return members, strangers


@dataclass
class Panel:
    """Held-out people with the same number of shots and queries each, over one base and bank.

    ``people`` hold their shots only, oldest first, so no method can look at a query. ``anchors`` are the anchors' own
    histories, in the bank's order, and ``pool`` the people behind the task LoRA, for the methods that need them.
    ``retrieve`` says how many earlier items every prompt shows, as those do that the bank was trained on. ``kept`` is a
    folder where evidence is left for another run, and ``memo`` what is the same for every panel over this bank.
    """

    base: BaseModel
    bank: Bank
    encoder: Encoder
    run: Run
    people: list[Person]
    queries: list[tuple[Item, ...]]
    on_step: OnStep | None = None
    anchors: Sequence[Person] = ()
    pool: Sequence[Person] = ()
    retrieve: int = 0
    kept: Path | None = None
    memo: dict[str, Any] = field(default_factory=dict, repr=False)
    wording: Task | None = None
    texts: bool = True  # whether free text is to be written, or only its likelihood told
    evidence_seconds: float = 0.0
    outcomes: dict[tuple[str, int], Any] = field(default_factory=dict, repr=False)
    _evidence: Evidence | None = field(default=None, repr=False)
    _gather: Callable[[], tuple[Evidence, float]] | None = field(default=None, repr=False)
    _plain: Panel | None = field(default=None, repr=False)
    _merges: dict[tuple[str, int], tuple[Merge, float]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        base: BaseModel,
        bank: Bank,
        encoder: Encoder,
        run: Run,
        people: Sequence[Person],
        *,
        shots: int,
        queries: int,
        ask: Ask = "next",
        **how: Any,
    ) -> Panel:
        """Split each person as ``shots_and_queries`` does; keywords are fields of the panel.

        Raises InputError as well if somebody was used for the bank: their queries may have been trained on.
        """
        if seen := sum(bool(bank.info.members.artefacts_of(person.id)) for person in people):
            raise InputError(
                f"{seen} of {len(people)} people are in the bank or its task LoRA; they cannot be tested on",
                hint="Give people the bank was not built from.",
            )
        parts = [shots_and_queries(bank.task, person, shots, queries, ask) for person in people]
        few = [replace(person, items=items, queries=()) for person, (items, _) in zip(people, parts)]
        panel = cls(base, bank, encoder, run, few, [asked for _, asked in parts], **how)
        return panel.profiled(panel.retrieve) if panel.retrieve else panel

    # -- what is asked -------------------------------------------------------------------------------------------------

    @property
    def task(self) -> Task:
        """The bank's task, in the panel's wording."""
        return self.wording or self.bank.task

    @cached_property
    def jobs(self) -> list[Shots]:
        """Everybody's shots as training examples."""
        return [shots_of(self.base, self.task, person) for person in self.people]

    @cached_property
    def golds(self) -> list[list[str]]:
        """The true answers to everybody's queries."""
        return [[self.task.target(item) for item in items] for items in self.queries]

    def plan(self, numbers: int, merge: MergeSettings | None = None) -> Plan:
        """Cohorts that fit the memory, with ``numbers`` trained for each person over their merge, if there is one."""
        below = frozen_numbers(self.bank, merge)
        return plan_cohorts(self.base, self.jobs, numbers, parse_size(self.run.memory), below=below)

    # -- stage 2, shared by many methods -------------------------------------------------------------------------------

    @property
    def evidence(self) -> Evidence:
        """Everybody's shots under every anchor: computed once, read by several policies."""
        if self._evidence is None:
            self._evidence, self.evidence_seconds = (self._gather or self._gathered)()
        return self._evidence

    def _gathered(self) -> tuple[Evidence, float]:
        bank = self.bank
        work = [bank.hash, str(self.base.dtype), self.base.prompts.max_tokens, *(job.key for job in self.jobs)]
        name = hashlib.sha256(json.dumps(work).encode()).hexdigest()[:24]
        path = self.kept / f"evidence-{name}.safetensors" if self.kept else None
        if path and path.is_file():
            return load_evidence(path)
        start = time.monotonic()
        found = gather_evidence(self.base, self.jobs, bank.working, bank.pooled, on_step=self.on_step)
        seconds = time.monotonic() - start
        if path:
            save_evidence(path, found, seconds)
        return found, seconds

    def merge(self, settings: MergeSettings, seed: int) -> tuple[Merge, float]:
        """Everybody's merge, made once, and the seconds it takes, evidence included."""
        if self._plain:
            return self._plain.merge(settings, seed)
        key = (settings.model_dump_json(), seed if settings.policy == "learned" else 0)
        if key not in self._merges:
            evidence = self.evidence if needs_evidence(settings) else None
            start, bank = time.monotonic(), self.bank
            merge = fit_merge(
                self.base,
                self.jobs,
                bank.working,
                bank.pooled,
                settings,
                similarity=self.similarity,
                evidence=evidence,
                seed=seed,
                tokens_per_batch=self.plan(len(bank), settings).tokens_per_batch,
                on_step=self.on_step,
            )
            self._merges[key] = merge, time.monotonic() - start + (self.evidence_seconds if evidence else 0.0)
        return self._merges[key]

    @cached_property
    def vectors(self) -> Tensor:
        """Everybody's shots as one vector each, (U, E)."""
        return encode_people(self.encoder, self.bank.task, self.people, self.bank.info.run.bank.encode)

    @cached_property
    def similarity(self) -> Tensor:
        """Cosine of everybody and every anchor, (U, N)."""
        return self.bank.similarity(self.vectors)

    # -- other panels over the same people -----------------------------------------------------------------------------

    def profiled(self, k: int, before: Sequence[str] = ()) -> Panel:
        """The same with ``before`` and a person's ``k`` nearest earlier shots in front of every prompt.

        A shot sees the shots before it, a query all of them. Merges stay those of the plain prompts, which the bank was
        trained on, unless it was trained on prompts like these.
        """
        task, told = self.bank.task, list(before) or [""] * len(self.people)
        whole = [replace(person, queries=asked) for person, asked in zip(self.people, self.queries)]
        seen = [with_profiles(task, person, k, text) for person, text in zip(whole, told)]
        people, queries = [replace(p, queries=()) for p in seen], [p.queries for p in seen]
        panel = replace(self, people=people, queries=queries, wording=task.profiled(), outcomes={})
        panel._plain = self._plain or (None if self.retrieve else self)
        return panel

    def folds(self, count: int) -> tuple[Panel, list[int]]:
        """The history asked about itself: ``count`` times each person without some shots, which become the queries.

        Returns the panel and whose each of its people is. Nobody's own queries are in it. Evidence of shots that are
        left is taken from this panel's. A person with one shot has no fold.
        """
        whose, kept, people, queries = [], [], [], []
        for u, person in enumerate(self.people):
            numbers = range(len(person.items))
            for start in range(min(count, len(numbers)) if len(numbers) > 1 else 0):
                held = numbers[start::count]
                rest = [n for n in numbers if n not in held]
                whose.append(u)
                kept.append(rest)
                people.append(Person(f"{person.id}/{start}", tuple(person.items[n] for n in rest)))
                queries.append(tuple(person.items[n] for n in held))

        def gather() -> tuple[Evidence, float]:
            return self.evidence.kept(whose, kept), 0.0  # paid for by this panel

        panel = Panel(self.base, self.bank, self.encoder, self.run, people, queries, self.on_step)
        panel.anchors, panel.pool, panel.memo = self.anchors, self.pool, self.memo
        panel.texts, panel.retrieve = False, self.retrieve
        if self.retrieve:  # an item that is asked about must not stand in another's prompt
            return panel.profiled(self.retrieve), whose
        panel._gather = gather
        return panel, whose
