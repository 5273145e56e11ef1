"""``Personalizer``: stages 2 and 3 for many people at once, and what can be done with the result."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from mta.adapt import adapt
from mta.bank.bank import Bank
from mta.bank.files import mark_stale
from mta.base import BaseModel
from mta.config import MergeSettings, Run, Settings, StackSettings, dump_yaml, parse_size
from mta.encode import Encoder, encode_people
from mta.errors import DataError, PersonNotFound, StoreError
from mta.evidence import shots_of
from mta.executor import Executor, LocalExecutor
from mta.fuse import Merge, fuse, merged
from mta.generate import generate
from mta.history import Item, Person
from mta.lora.batch import LoraBatch, join
from mta.lora.layers import Adapters, applied
from mta.lora.merge import merge_exact, truncate
from mta.lora.peft import write_peft
from mta.rows import Nobody, Who, row_adapters
from mta.score import label_scores, log_likelihood
from mta.store import State, Store, work_key
from mta.training.checkpoint import Checkpoint
from mta.training.plan import Plan, plan_cohorts
from mta.training.trainer import Job, OnStep

Question = str | Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _How:
    """How a call reports and where its cohorts leave checkpoints."""

    on_step: OnStep | None
    checkpoints: Path | None


@dataclass(frozen=True, slots=True)
class Personalized:
    """What ``personalize`` did: how many people were trained, how many were there already, how many texts were cut."""

    trained: int
    unchanged: int
    shortened: int


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What ``forget`` did: whether states were there, and which trained parts of the bank still hold something."""

    states_removed: bool
    needs_rebuild: list[str]


class Personalizer:
    """The stages as one object over a base, a bank and (optionally) a store of people's states.

    >>> personal = Personalizer(base, bank, store="people/")
    >>> personal.personalize(people)                              # all of them together
    >>> personal.generate([("ann", "..."), ("bob", "...")])       # one batch, two people
    """

    def __init__(
        self,
        base: BaseModel,
        bank: Bank,
        store: str | Path | Store | None = None,
        *,
        run: Run | None = None,
        encoder: Encoder | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.base, self.bank = base, bank
        self.run = run or bank.info.run
        self.store = Store(store) if isinstance(store, (str, Path)) else store
        self.executor = executor or LocalExecutor()
        self._encoder = encoder
        self._unsaved: dict[str, State] = {}

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder the bank's anchors were placed with."""
        return self._encoder or self.bank.encoder(self.base)

    # -- stages 2 and 3 ------------------------------------------------------------------------------------------------

    def personalize(
        self, people: Sequence[Person], *, on_step: OnStep | None = None, checkpoints: str | Path | None = None
    ) -> Personalized:
        """Merge and adapt for everybody in ``people``; their histories are the shots.

        States already made of the same shots, bank and settings are left as they are. Cohorts are planned over all of
        ``people``, so that a repeated call computes as the first did; a cohort in which somebody is missing is computed
        whole. With ``checkpoints`` (a folder) a killed cohort goes on where it was.
        Raises DataError for a person without items, MemoryBudgetError.
        """
        ordered = sorted(people, key=lambda person: person.id)
        _check(ordered)
        works = {person.id: self._work(person) for person in ordered}
        there = {person.id for person in ordered if self._has(person.id, works[person.id])}
        jobs = [shots_of(self.base, self.bank.task, person) for person in ordered]
        how = _How(on_step, Path(checkpoints) if checkpoints else None)
        # The plan is over everybody, done or not, so that a resumed run computes in the cohorts of the first.
        plan = plan_cohorts(self.base, jobs, self._numbers(), parse_size(self.run.memory))

        def cohort(numbers: Sequence[int]) -> None:
            chosen, theirs = [ordered[n] for n in numbers], [jobs[n] for n in numbers]
            for person, state in zip(chosen, self._states(chosen, theirs, works, plan, how)):
                self._keep(person.id, state)

        unfinished = [c for c in plan.cohorts if any(ordered[n].id not in there for n in c)]
        list(self.executor.map(cohort, unfinished))
        cut = sum(example.cut > 0 for job in jobs for example in job.examples)
        return Personalized(len(people) - len(there), len(there), cut)

    def _states(
        self, people: Sequence[Person], jobs: Sequence[Job], works: Mapping[str, str], plan: Plan, how: _How
    ) -> list[State]:
        """One cohort through stages 2 and 3."""
        merge = self.merge(people, jobs, plan.tokens_per_batch, how.on_step)
        stacks = self._stacks(jobs, merge, plan, [works[person.id] for person in people], how)
        return [
            State(
                bank=self.bank.hash,
                anchors=tuple(merge.ids[i].tolist()),
                w=tuple(merge.w[i].tolist()),
                policy=self.run.merge.policy,
                history=person.digest(),
                work=works[person.id],
                seed=self.run.seed,
                stack=stacks.select([i]).to(torch.device("cpu")) if stacks else None,
                mode=self.run.merge.mode,
                rank=self.run.merge.rank,
            )
            for i, person in enumerate(people)
        ]

    def _stacks(
        self, jobs: Sequence[Job], merge: Merge, plan: Plan, works: Sequence[str], how: _How
    ) -> LoraBatch | None:
        """Stage 3 for one cohort, or None where it is switched off."""
        settings = self.run.stack
        if not settings.enabled:
            return None
        name = hashlib.sha256("/".join([plan.digest, *works]).encode()).hexdigest()
        checkpoint = Checkpoint(how.checkpoints / f"{name[:24]}.checkpoint", name) if how.checkpoints else None
        stacks = adapt(
            self.base,
            jobs,
            [*self.bank.pooled, merged(self.bank, merge, self.run.merge)],
            settings.lora,
            settings.training,
            seed=self.run.seed,
            tokens_per_batch=plan.tokens_per_batch,
            checkpoint=checkpoint,
            on_step=partial(how.on_step, "stack") if how.on_step else None,
        )
        if checkpoint:
            checkpoint.remove()
        return stacks

    def merge(
        self, people: Sequence[Person], jobs: Sequence[Job], tokens_per_batch: int = 4096, on_step: OnStep | None = None
    ) -> Merge:
        """Stage 2 for these people: their anchors and coefficients, from their shots alone."""
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
            on_step=on_step,
        )

    # -- using what was made -------------------------------------------------------------------------------------------

    def generate(
        self,
        rows: Sequence[tuple[Who, Question]],
        *,
        max_new_tokens: int = 64,
        stacked: bool = True,
        temperature: float = 0.0,
    ) -> list[str]:
        """Answer questions of different people, and of nobody (``mta.TASK``, ``mta.BASE``), in one batch.

        ``stacked=False`` leaves the stacks out: merges alone. Raises PersonNotFound, DataError.
        """
        owners, adapters = self._adapters([who for who, _ in rows], stacked)
        prompts = [
            self.base.prompts.prompt(self.bank.task, self.bank.task.asked(question), max_new_tokens).tokens
            for _, question in rows
        ]
        tokens = generate(
            self.base,
            prompts,
            owners,
            adapters,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=self.run.seed,
        )
        return [self.base.prompts.decode(answer) for answer in tokens]

    def score(self, rows: Sequence[tuple[Who, Question, str]], *, stacked: bool = True) -> list[float]:
        """Log probability of a given answer for each row, its end token included. Raises PersonNotFound, DataError."""
        owners, adapters = self._adapters([who for who, _, _ in rows], stacked)
        task = self.bank.task
        jobs = [[self.base.prompts.example(task, task.asked(question), answer)] for _, question, answer in rows]
        return [float(found[0]) for found in log_likelihood(self.base, jobs, adapters, owners=owners)]

    def label_scores(self, rows: Sequence[tuple[Who, Sequence[Item]]], *, stacked: bool = True) -> list[Tensor]:
        """Log probability of every label for every item of every row: a list of (items, labels) tensors."""
        owners, adapters = self._adapters([who for who, _ in rows], stacked)
        return label_scores(self.base, self.bank.task, [items for _, items in rows], adapters, owners=owners)

    def applied(self, whose: Sequence[Who], *, stacked: bool = True) -> AbstractContextManager[None]:
        """Within the block, row i of a batch through ``base.model`` is computed for ``whose[i]``."""
        owners, adapters = self._adapters(whose, stacked)
        return applied(self.base.model, adapters, torch.tensor(owners, device=self.base.device))

    def export(self, person: str, out: str | Path, *, rank: int | None = None) -> float:
        """Write task LoRA, merge and stack as one PEFT folder for the untouched base.

        ``rank`` compresses by svd. Returns the relative error that causes (0 without). Raises PersonNotFound.
        """
        state = self.state(person)
        ids, w = torch.tensor([state.anchors]), torch.tensor([state.w], dtype=self.base.master_dtype)
        parts = [merge_exact(self.bank.anchors, ids, w)]
        parts += [part for part in (self.bank.task_lora, state.stack) if part]
        whole, error = join([part.to(torch.device("cpu"), torch.float32) for part in parts]), torch.zeros(1)
        if rank is not None and rank < whole.rank:
            whole, error = truncate(whole, rank)
        write_peft(out, whole, self.base.name, fan_in_fan_out=self.base.fan_in_fan_out)
        return float(error)

    def forget(self, person: str) -> Forgotten:
        """Remove a person's states and history; name the trained parts that still hold something learnt from them."""
        removed = self._unsaved.pop(person, None) is not None
        if self.store:
            removed = self.store.forget(person) or removed
        return Forgotten(removed, mark_stale(self.bank.folder, person))

    def state(self, person: str) -> State:
        """What is kept of a person. Raises PersonNotFound, StateCorrupt; StoreError if it is of another bank."""
        if person in self._unsaved:
            return self._unsaved[person]
        if not self.store:
            raise PersonNotFound("no state is known for that person", hint="Call personalize for them first.")
        state = self.store.load(person)
        if state.bank != self.bank.hash:
            raise StoreError(
                f"the person's state was made with bank {state.bank[:8]}…, "
                f"the bank at {self.bank.folder} is {self.bank.hash[:8]}…",
                hint="Open that bank, or personalize again: mta personalize",
            )
        return state

    # -- within --------------------------------------------------------------------------------------------------------

    def _adapters(self, whose: Sequence[Who], stacked: bool) -> tuple[list[int], list[Adapters]]:
        """Row owners and adapters for a batch of different people: everybody a row of coefficients and a stack."""
        known = list(dict.fromkeys(whose))
        states = [who if isinstance(who, Nobody) else self.state(who) for who in known]
        place = {who: i for i, who in enumerate(known)}
        return [place[who] for who in whose], row_adapters(self.base, self.bank, states, stacked)

    def _work(self, person: Person) -> str:
        settings = _Kept(
            merge=self.run.merge,
            stack=self.run.stack,
            dtype=str(self.base.dtype),
            max_tokens=self.base.prompts.max_tokens,
        )
        return work_key(self.bank.hash, person.digest(), dump_yaml(settings), self.run.seed)

    def _has(self, person: str, work: str) -> bool:
        try:
            return self.state(person).work == work
        except (PersonNotFound, StoreError):
            return False

    def _keep(self, person: str, state: State) -> None:
        if self.store:
            self.store.save(person, state)
        else:
            self._unsaved[person] = state

    def _numbers(self) -> int:
        """How many numbers are trained for a person."""
        stack = self.run.stack
        return stack.lora.rank * sum(d + o for d, o in self.base.targets.values()) if stack.enabled else 1


def forget_person(person: str, store: str | Path, bank: Path) -> Forgotten:
    """``Personalizer.forget`` without loading a model."""
    parts = mark_stale(bank, person)  # first: where there is no bank, nothing is done rather than half of it
    if "://" not in str(store):
        shutil.rmtree(Path(store) / "work", ignore_errors=True)  # a stopped run's checkpoint may hold their stack
    return Forgotten(Store(store).forget(person), parts)


class _Kept(Settings):
    """The settings a state depends on."""

    merge: MergeSettings
    stack: StackSettings
    dtype: str
    max_tokens: int


def _check(people: Sequence[Person]) -> None:
    if empty := sum(not person.items for person in people):
        raise DataError(
            f"{empty} of {len(people)} people have no item", hint="Personalizing takes at least one shot each."
        )
    if len({person.id for person in people}) < len(people):
        raise DataError("a person is given twice", hint="Put all items of a person into one history.")
