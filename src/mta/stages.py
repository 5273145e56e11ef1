"""Stages 2 and 3, cohort by cohort: from people's shots to what is kept of them."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mta.adapt import adapt
from mta.aside import read_json, write_json
from mta.bank.bank import Bank
from mta.base import BaseModel
from mta.config import MergeSettings, Run, Settings, StackSettings, dump_yaml, parse_size
from mta.encode import Encoder, encode_people
from mta.evidence import shots_of
from mta.fuse import Merge, fuse, merged, merged_bytes
from mta.history import Person
from mta.lora.batch import LoraBatch
from mta.state import State, work_key
from mta.training.checkpoint import Checkpoint
from mta.training.plan import Plan, plan_cohorts
from mta.training.trainer import Job, OnStep

_ABANDONED = 7 * 24 * 3600.0  # seconds after which nobody will go on with a stopped run


@dataclass(frozen=True, slots=True)
class Wanted:
    """A person, and the work key of the state they should have."""

    person: Person
    work: str

    @classmethod
    def of(cls, person: Person, base: BaseModel, bank: Bank, run: Run) -> Wanted:
        """The state that this bank and these settings make of a person's items."""
        settings = _Kept(merge=run.merge, stack=run.stack, dtype=str(base.dtype), max_tokens=base.prompts.max_tokens)
        return cls(person, work_key(bank.hash, person.digest(), dump_yaml(settings), run.seed))

    @property
    def name(self) -> str:
        """Names person and work in a file; it confirms a guessed id only to who has the texts as well."""
        return hashlib.sha256(f"{self.work}/{self.person.id}".encode()).hexdigest()


class _Kept(Settings):
    """The settings a state depends on."""

    merge: MergeSettings
    stack: StackSettings
    dtype: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Cohorts:
    """Who is computed in this run, their shots, and who of them together."""

    wanted: list[Wanted]
    jobs: list[Job]
    plan: Plan


def folder_of_run(work: Path, everybody: Sequence[Wanted]) -> Path:
    """Where a run over ``everybody`` leaves its plan and checkpoints: other runs over the same store keep theirs."""
    return work / hashlib.sha256("/".join(wanted.name for wanted in everybody).encode()).hexdigest()[:24]


@dataclass(frozen=True, slots=True)
class Stages:
    """How cohorts are computed: over what, how they report, and the ``folder`` where stopped ones leave checkpoints."""

    base: BaseModel
    bank: Bank
    run: Run
    encoder: Encoder
    on_step: OnStep | None = None
    folder: Path | None = None

    def cohorts(self, everybody: Sequence[Wanted], missing: Sequence[Wanted]) -> Cohorts:
        """Those who are missing, in cohorts; where a run over all of them was stopped, in the cohorts of that run.

        So a newcomer costs what one person costs, and what was killed and resumed equals what was not.
        """
        known = {wanted.name: wanted for wanted in everybody}
        begun = read_json(self.folder / "plan.json") if self.folder else None
        names = begun if isinstance(begun, list) and set(begun) <= set(known) else []
        chosen = [known[name] for name in names] if {w.name for w in missing} <= set(names) else list(missing)
        jobs = [shots_of(self.base, self.bank.task, wanted.person) for wanted in chosen]
        stack, targets = self.run.stack, self.base.targets.values()
        numbers = stack.lora.rank * sum(d + o for d, o in targets) if stack.enabled else 1
        frozen = merged_bytes(self.run.merge, self.bank) if stack.enabled else 0
        plan = plan_cohorts(self.base, jobs, numbers, parse_size(self.run.memory), frozen=frozen)
        if self.folder:
            write_json(self.folder / "plan.json", [wanted.name for wanted in chosen])
        return Cohorts(chosen, jobs, plan)

    def finish(self) -> None:
        """Everybody's state is there: what the run left of people goes, and what other runs left long ago."""
        if self.folder:
            for folder in self.folder.parent.iterdir():
                if folder == self.folder or time.time() - folder.stat().st_mtime > _ABANDONED:
                    shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # other runs' folders may be there
                self.folder.parent.rmdir()

    def states(self, numbers: Sequence[int], cohorts: Cohorts) -> list[State]:
        """One cohort through stages 2 and 3."""
        wanted, jobs = [cohorts.wanted[n] for n in numbers], [cohorts.jobs[n] for n in numbers]
        merge = self.merge([w.person for w in wanted], jobs, cohorts.plan.tokens_per_batch)
        stacks = self._stacks([w.work for w in wanted], jobs, merge, cohorts.plan)
        return [
            State(
                bank=self.bank.hash,
                anchors=tuple(merge.ids[i].tolist()),
                w=tuple(merge.w[i].tolist()),
                policy=self.run.merge.policy,
                history=person.digest(),
                work=work,
                seed=self.run.seed,
                stack=stacks.select([i]).to(torch.device("cpu")) if stacks else None,
                mode=self.run.merge.mode,
                rank=self.run.merge.rank,
            )
            for i, (person, work) in enumerate((w.person, w.work) for w in wanted)
        ]

    def merge(self, people: Sequence[Person], jobs: Sequence[Job], tokens_per_batch: int) -> Merge:
        """Stage 2: people's anchors and coefficients, from their shots alone."""
        vectors = encode_people(self.encoder, self.bank.task, people, self.bank.info.run.bank.encode)
        return fuse(
            self.base,
            jobs,
            self.bank.working,
            self.bank.pooled,
            self.bank.similarity(vectors),
            self.run.merge,
            seed=self.run.seed,
            tokens_per_batch=tokens_per_batch,
            on_step=self.on_step,
        )

    def _stacks(self, works: Sequence[str], jobs: Sequence[Job], merge: Merge, plan: Plan) -> LoraBatch | None:
        """Stage 3, or None where it is switched off."""
        settings = self.run.stack
        if not settings.enabled:
            return None
        name = hashlib.sha256("/".join([plan.digest, *works]).encode()).hexdigest()
        checkpoint = Checkpoint(self.folder / f"{name[:24]}.checkpoint", name) if self.folder else None
        stacks = adapt(
            self.base,
            jobs,
            [*self.bank.pooled, merged(self.bank, merge, self.run.merge)],
            settings.lora,
            settings.training,
            seed=self.run.seed,
            tokens_per_batch=plan.tokens_per_batch,
            checkpoint=checkpoint,
            on_step=partial(self.on_step, "stack") if self.on_step else None,
        )
        if checkpoint:
            checkpoint.remove()
        return stacks
