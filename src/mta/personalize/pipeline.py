"""Stages 2 and 3, cohort by cohort: from people's shots to what is kept of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from mta.bank.bank import Bank
from mta.config import MergeSettings, Run, StackSettings, parse_size
from mta.config.loader import Settings, dump_yaml
from mta.data.history import Person
from mta.errors import Diverged
from mta.lora.batch import LoraBatch
from mta.lora.layers import Adapters, PerPerson
from mta.model.base import BaseModel
from mta.model.encoders import Encoder, encode_people
from mta.personalize.adapt import adapt
from mta.personalize.likelihoods import gather_evidence, shots_of, surprise, targets_of
from mta.personalize.merge import Merge, frozen_numbers, fuse, merged, needs_evidence
from mta.store.state import Losses, State, work_key
from mta.store.workspace import Work
from mta.training.checkpoint import Checkpoint
from mta.training.plan import Plan, plan_cohorts
from mta.training.trainer import Job, OnStep


@dataclass(frozen=True, slots=True)
class Wanted:
    """A person, and the work key of the state they should have.

    Where it is made from a state ``before``, that one holds what the first ``known`` items say; it may lack its stack
    where a store has it, as ``version``.
    """

    person: Person
    work: str
    before: State | None = None
    known: int = 0
    version: int = 0

    @classmethod
    def of(
        cls, person: Person, bank: Bank, settings: str, seed: int, before: State | None = None, known: int = 0
    ) -> Wanted:
        """The state that this bank and ``settings_of`` a run make of a person's items, anew or from ``before``."""
        how = settings + (f"after: {before.work}\n" if before else "")
        return cls(person, work_key(bank.hash, person.digest(), how, seed), before, known)

    @property
    def shots(self) -> Person:
        """The person with those items alone that are yet to be learnt from."""
        return Person(self.person.id, self.person.items[self.known :])

    @property
    def name(self) -> str:
        """Names person and work in a file; it confirms a guessed id only to who has the texts as well."""
        return hashlib.sha256(f"{self.work}/{self.person.id}".encode()).hexdigest()


def settings_of(base: BaseModel, run: Run) -> str:
    """All settings that decide a state, as text."""
    kept = _Kept(merge=run.merge, stack=run.stack, dtype=str(base.dtype), max_tokens=base.prompts.max_tokens)
    return dump_yaml(kept)


def digest_of(settings: str, seed: int) -> str:
    """Of all settings that decide a state: one of others is not gone on from."""
    return hashlib.sha256(f"{seed}\n{settings}".encode()).hexdigest()


class _Kept(Settings):
    """The settings a state depends on."""

    merge: MergeSettings
    stack: StackSettings
    dtype: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Cohort:
    """People who are computed together, in rows of at most ``tokens_per_batch``."""

    wanted: tuple[Wanted, ...]
    tokens_per_batch: int
    threads: int

    def __len__(self) -> int:
        return len(self.wanted)

    @property
    def digest(self) -> str:
        """Names the work: a checkpoint of another cohort is not used."""
        works = [wanted.work for wanted in self.wanted]
        return hashlib.sha256(json.dumps([works, self.tokens_per_batch, self.threads]).encode()).hexdigest()

    def halves(self) -> tuple[Cohort, ...]:
        """The first and the second half of the people; nothing where there is one."""
        middle = len(self) // 2
        return tuple(replace(self, wanted=part) for part in (self.wanted[:middle], self.wanted[middle:]) if middle)


@dataclass(frozen=True, slots=True)
class Cohorts:
    """Who is computed in this run and who of them together; how many of their texts were cut."""

    wanted: list[Wanted]
    plan: Plan
    cut: int

    def lacking(self, missing: Sequence[Wanted]) -> list[Cohort]:
        """The cohorts that somebody's state is missing from."""
        names, plan = {wanted.name for wanted in missing}, self.plan
        all_of_them = (tuple(self.wanted[n] for n in numbers) for numbers in plan.cohorts)
        return [
            Cohort(wanted, plan.tokens_per_batch, plan.threads)
            for wanted in all_of_them
            if any(one.name in names for one in wanted)
        ]


@dataclass(frozen=True, slots=True)
class Stages:
    """How cohorts are computed: over what, how they report, and where stopped ones leave their ``work``."""

    base: BaseModel
    bank: Bank
    run: Run
    encoder: Encoder
    on_step: OnStep | None = None
    work: Work | None = None

    def cohorts(
        self, everybody: Sequence[Wanted], missing: Sequence[Wanted], most: int = 256, threads: int | None = None
    ) -> Cohorts:
        """Those who are missing, in cohorts; where a run over all of them was stopped, in the cohorts of that run.

        So a newcomer costs what one person costs, and what was killed and resumed equals what was not.
        """
        known = {wanted.name: wanted for wanted in everybody}
        begun = self.work.plan() if self.work else None
        names = begun if begun and set(begun) <= set(known) else []
        chosen = [known[name] for name in names] if {w.name for w in missing} <= set(names) else list(missing)
        stack, targets = self.run.stack, self.base.targets.values()
        numbers = stack.lora.rank * sum(d + o for d, o in targets) if stack.enabled else 1
        below = frozen_numbers(self.bank, self.run.merge)
        cut = 0

        def jobs() -> Iterator[Job]:
            nonlocal cut
            for wanted in chosen:
                yield (job := shots_of(self.base, self.bank.task, wanted.shots))
                cut += sum(example.cut > 0 for example in job.examples)

        memory = parse_size(self.run.memory)
        plan = plan_cohorts(self.base, jobs(), numbers, memory, below=below, most=most, threads=threads)
        if self.work:
            self.work.note([wanted.name for wanted in chosen])
        return Cohorts(chosen, plan, cut)

    def jobs(self, cohort: Cohort) -> list[Job]:
        """What each of a cohort is trained on."""
        return [shots_of(self.base, self.bank.task, wanted.shots) for wanted in cohort.wanted]

    def states(self, cohort: Cohort) -> list[State | Diverged]:
        """One cohort through stages 2 and 3; whoever diverged is none of the others' business."""
        jobs = self.jobs(cohort)
        merge, pooled = self._merge(cohort, jobs)
        return self.as_states(cohort, jobs, merge, self.stacks(cohort, jobs, merge), pooled)

    def as_states(
        self,
        cohort: Cohort,
        jobs: Sequence[Job],
        merge: Merge,
        stacks: LoraBatch | None,
        pooled: Sequence[float] | None = None,
    ) -> list[State | Diverged]:
        """What is kept of each of a cohort, and what it makes of the ``jobs`` it was learnt from.

        ``pooled`` are the jobs' losses under the pooled model, where they are known.
        """
        losses = self.losses(jobs, merge, stacks, cohort.tokens_per_batch, pooled)
        settings = digest_of(settings_of(self.base, self.run), self.run.seed)

        def made(i: int, wanted: Wanted) -> State | Diverged:
            try:
                return State(
                    bank=self.bank.hash,
                    anchors=tuple(merge.ids[i].tolist()),
                    w=tuple(merge.w[i].tolist()),
                    policy=self.run.merge.policy,
                    history=wanted.person.digest(),
                    work=wanted.work,
                    seed=self.run.seed,
                    stack=stacks.select([i]).to(torch.device("cpu")) if stacks else None,
                    mode=self.run.merge.mode,
                    rank=self.run.merge.rank,
                    losses=Losses(*losses[i]).after(wanted.before.losses if wanted.before else None),
                    settings=settings,
                )
            except Diverged as error:
                return error

        return [made(i, wanted) for i, wanted in enumerate(cohort.wanted)]

    def _merge(self, cohort: Cohort, jobs: Sequence[Job]) -> tuple[Merge, list[float] | None]:
        """Stage 2: people's anchors and coefficients, from their shots alone; and what evidence says of the pooled."""
        people = [wanted.person for wanted in cohort.wanted]
        vectors = encode_people(self.encoder, self.bank.task, people, self.bank.info.run.bank.encode)
        settings, bank = self.run.merge, (self.bank.working, self.bank.pooled)
        how: dict[str, Any] = {"tokens_per_batch": cohort.tokens_per_batch, "on_step": self.on_step}
        evidence = gather_evidence(self.base, jobs, *bank, **how) if needs_evidence(settings) else None
        near = self.bank.similarity(vectors)
        merge = fuse(self.base, jobs, *bank, near, settings, evidence, seed=self.run.seed, **how)
        return merge, (-evidence.task / evidence.tokens).tolist() if evidence else None

    def stacks(
        self, cohort: Cohort, jobs: Sequence[Job], merge: Merge, start: LoraBatch | None = None
    ) -> LoraBatch | None:
        """Stage 3, from nothing or from ``start``; None where it is switched off."""
        settings = self.run.stack
        if not settings.enabled:
            return None
        return adapt(
            self.base,
            jobs,
            [*self.bank.pooled, merged(self.bank, merge, self.run.merge)],
            settings.lora,
            settings.training,
            start=start,
            seed=self.run.seed,
            tokens_per_batch=cohort.tokens_per_batch,
            checkpoint=self._checkpoint(cohort),
            on_step=partial(self.on_step, "stack") if self.on_step else None,
        )

    def remove_checkpoint(self, cohort: Cohort) -> None:
        """Remove the checkpoint of a cohort. Call this after the cohort's states are saved."""
        if checkpoint := self._checkpoint(cohort):
            checkpoint.remove()

    def _checkpoint(self, cohort: Cohort) -> Checkpoint | None:
        return self.work.checkpoint(cohort.digest) if self.work else None

    def losses(
        self,
        jobs: Sequence[Job],
        merge: Merge,
        stacks: LoraBatch | None,
        tokens_per_batch: int,
        pooled: Sequence[float] | None = None,
    ) -> list[tuple[float, float, float | None, int]]:
        """What everybody's shots cost, as ``Losses`` has it, finite or not: a pass each."""

        def under(*added: Adapters) -> list[float]:
            return surprise(self.base, jobs, [*self.bank.pooled, *added], tokens_per_batch=tokens_per_batch)

        over = merged(self.bank, merge, self.run.merge)
        stacked: Sequence[float | None] = under(over, PerPerson(stacks)) if stacks else [None] * len(jobs)
        return list(zip(pooled or under(), under(over), stacked, map(targets_of, jobs)))
