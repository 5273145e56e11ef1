"""``Personalizer``: stages 2 and 3 for many people at once, and what can be done with the result."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mta.bank.bank import Bank
from mta.bank.files import mark_stale
from mta.base import BaseModel
from mta.config import MergeSettings, Run
from mta.encode import Encoder
from mta.errors import DataError, InputError, OtherBank, PersonNotFound, StateCorrupt
from mta.executor import Executor, LocalExecutor
from mta.fuse import Merge, check_merge, merged_factors
from mta.generate import generate
from mta.history import Item, Person
from mta.lora.batch import join
from mta.lora.layers import Adapters, applied
from mta.lora.merge import truncate
from mta.lora.peft import write_peft
from mta.rows import Nobody, Who, row_adapters
from mta.score import label_scores, log_likelihood
from mta.stages import Stages, Wanted, folder_of_run
from mta.store import State, Store
from mta.training.trainer import OnStep

Question = str | Mapping[str, str]
log = logging.getLogger("mta")


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
        return self._encoder or self.bank.encoder(self.base, self.run.encoder)

    # -- stages 2 and 3 ------------------------------------------------------------------------------------------------

    def personalize(
        self,
        people: Sequence[Person],
        *,
        keep_histories: bool = False,
        resume: bool = True,
        on_step: OnStep | None = None,
    ) -> Personalized:
        """Merge and adapt for everybody in ``people``; their histories are the shots.

        States already made of the same shots, bank and settings are left as they are; the others are computed together,
        in cohorts that fit the memory. Over a local store a killed run goes on where it was, in the same cohorts,
        unless ``resume`` is off. ``keep_histories`` keeps people's items too, in the store, until they are forgotten.
        Raises DataError for a person without items, MemoryBudgetError, ConfigError.
        """
        _check(people)
        check_merge(self.run.merge, len(self.bank), self.bank.task.labelled)
        ordered = sorted(people, key=lambda person: person.id)
        everybody = [Wanted.of(person, self.base, self.bank, self.run) for person in ordered]
        if keep_histories:
            self._keep_histories(ordered)
        missing = [wanted for wanted in everybody if not self._has(wanted)]
        if not missing:
            return Personalized(0, len(people), 0)
        folder = folder_of_run(self.store.work, everybody) if self.store and self.store.work else None
        if folder and not resume:
            shutil.rmtree(folder, ignore_errors=True)
        stages = Stages(self.base, self.bank, self.run, self.encoder, on_step, folder)
        cohorts = stages.cohorts(everybody, missing)
        lacking = {wanted.person.id for wanted in missing}

        def compute(numbers: Sequence[int]) -> None:
            for n, state in zip(numbers, stages.states(numbers, cohorts)):
                self._keep(cohorts.wanted[n].person.id, state)

        unfinished = [c for c in cohorts.plan.cohorts if any(cohorts.wanted[n].person.id in lacking for n in c)]
        list(self.executor.map(compute, unfinished))
        stages.finish()
        cut = sum(example.cut > 0 for job in cohorts.jobs for example in job.examples)
        return Personalized(len(missing), len(people) - len(missing), cut)

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
        task = self.bank.task
        prompts = [self.base.prompts.prompt(task, task.asked(question), max_new_tokens) for _, question in rows]
        if shortened := sum(prompt.cut > 0 for prompt in prompts):
            log.warning("%d of %d questions were too long and lost the end of their text", shortened, len(prompts))
        tokens = generate(
            self.base,
            [prompt.tokens for prompt in prompts],
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

        Without ``rank`` nothing is lost and the rank is the sum of the parts', K * R for an exact merge of K anchors;
        ``rank`` compresses by svd. Returns the relative error that causes (0 without). Raises PersonNotFound.
        """
        state = self.state(person)
        used = [n for n, w in enumerate(state.w) if w] or [0]  # an anchor that weighs nothing needs no rank
        ids, w = torch.tensor([state.anchors])[:, used], torch.tensor([state.w], dtype=self.base.master_dtype)[:, used]
        settings = MergeSettings(mode=state.mode, rank=state.rank)
        parts = [merged_factors(self.bank.anchors, Merge(ids, w), settings)]
        parts += [part for part in (self.bank.task_lora, state.stack) if part]
        whole, error = join([part.to(torch.device("cpu"), torch.float32) for part in parts]), torch.zeros(1)
        if rank is not None and rank < whole.rank:
            whole, error = truncate(whole, rank)
        write_peft(out, whole, self.base.name, fan_in_fan_out=self.base.fan_in_fan_out)
        return float(error)

    def forget(self, person: str) -> Forgotten:
        """Remove a person's states and history; name the trained parts that still hold something learnt from them."""
        removed = self._unsaved.pop(person, None) is not None
        found = forget_person(person, self.store, self.bank.folder)
        return Forgotten(removed or found.states_removed, found.needs_rebuild)

    def state(self, person: str) -> State:
        """What is kept of a person. Raises PersonNotFound, StateCorrupt; StoreError if it is of another bank."""
        if person in self._unsaved:
            return self._unsaved[person]
        if not self.store:
            raise PersonNotFound("no state is known for that person", hint="Call personalize for them first.")
        state = self.store.load(person)
        if state.bank != self.bank.hash:
            raise OtherBank(
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

    def _has(self, wanted: Wanted) -> bool:
        try:
            return self.state(wanted.person.id).work == wanted.work
        except (PersonNotFound, StateCorrupt, OtherBank):
            return False

    def _keep_histories(self, people: Sequence[Person]) -> None:
        if not self.store:
            raise InputError("histories are kept in a store, and there is none", hint='Give one: store="people/"')
        for person in people:
            self.store.save_history(person)

    def _keep(self, person: str, state: State) -> None:
        if self.store:
            self.store.save(person, state)
        else:
            self._unsaved[person] = state


def forget_person(person: str, store: Store | None, bank: Path | None) -> Forgotten:
    """``Personalizer.forget`` without loading a model. Without a ``bank``, what was learnt from them is not asked for.

    Raises BankCorrupt where there is no bank: nothing is done rather than half of it.
    """
    parts = mark_stale(bank, person) if bank else []
    if store and store.work:
        shutil.rmtree(store.work, ignore_errors=True)  # a stopped run's checkpoint may hold their stack
    return Forgotten(store.forget(person) if store else False, parts)


def _check(people: Sequence[Person]) -> None:
    if empty := sum(not person.items for person in people):
        raise DataError(
            f"{empty} of {len(people)} people have no item", hint="Personalizing takes at least one shot each."
        )
    if len({person.id for person in people}) < len(people):
        raise DataError("a person is given twice", hint="Put all items of a person into one history.")
