"""The protocol: a person's first items are the shots, the items that follow are the queries, for every method alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from mta.bank.bank import Bank
from mta.base import BaseModel
from mta.config import MergeSettings, Run, parse_size
from mta.encode import Encoder, encode_people
from mta.errors import InputError
from mta.evidence import Evidence, gather_evidence, shots_of
from mta.fuse import Merge, fuse, merged_bytes, needs_evidence
from mta.history import Item, Person
from mta.training.plan import Plan, plan_cohorts
from mta.training.trainer import Job, OnStep


@dataclass
class Panel:
    """Held-out people with the same number of shots and queries each, over one base and bank.

    ``people`` hold their shots only, so no method can look at a query.
    """

    base: BaseModel
    bank: Bank
    encoder: Encoder
    run: Run
    people: list[Person]
    queries: list[tuple[Item, ...]]
    on_step: OnStep | None = None
    evidence_seconds: float = 0.0
    _evidence: Evidence | None = field(default=None, repr=False)
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
        on_step: OnStep | None = None,
    ) -> Panel:
        """Split each person. A benchmark's own queries come before later items. Raises InputError.

        Raises InputError as well if somebody was used for the bank: their queries may have been trained on.
        """
        if seen := sum(bool(bank.info.members.artefacts_of(person.id)) for person in people):
            raise InputError(
                f"{seen} of {len(people)} people are in the bank or its task LoRA; they cannot be tested on"
            )
        asked = [person.queries[-queries:] or person.after(shots, queries) for person in people]
        few = [Person(person.id, person.items[:shots]) for person in people]
        return cls(base, bank, encoder, run, few, asked, on_step)

    @cached_property
    def jobs(self) -> list[Job]:
        """Everybody's shots as training examples."""
        return [shots_of(self.base, self.bank.task, person) for person in self.people]

    def plan(self, numbers: int, merge: MergeSettings | None = None) -> Plan:
        """Cohorts that fit the memory, with ``numbers`` trained for each person over their merge, if there is one."""
        frozen = merged_bytes(merge, self.bank) if merge else 0
        return plan_cohorts(self.base, self.jobs, numbers, parse_size(self.run.memory), frozen=frozen)

    @cached_property
    def golds(self) -> list[list[str]]:
        """The true answers to everybody's queries."""
        return [[self.bank.task.target(item) for item in items] for items in self.queries]

    @property
    def evidence(self) -> Evidence:
        """Everybody's shots under every anchor: computed once, read by several policies."""
        if self._evidence is None:
            start = time.monotonic()
            bank = self.bank
            self._evidence = gather_evidence(self.base, self.jobs, bank.working, bank.pooled, on_step=self.on_step)
            self.evidence_seconds = time.monotonic() - start
        return self._evidence

    def merge(self, settings: MergeSettings, seed: int) -> tuple[Merge, float]:
        """Everybody's merge, made once, and the seconds it takes, evidence included."""
        key = (settings.model_dump_json(), seed if settings.policy == "learned" else 0)
        if key not in self._merges:
            evidence = self.evidence if needs_evidence(settings) else None
            start, bank = time.monotonic(), self.bank
            merge = fuse(
                self.base,
                self.jobs,
                bank.working,
                bank.pooled,
                self.similarity,
                settings,
                evidence,
                seed=seed,
                tokens_per_batch=self.plan(len(bank)).tokens_per_batch,
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
