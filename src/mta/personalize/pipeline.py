"""Personalize or update many people: plan cohorts, compute them on an executor, and collect the outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

from mta.bank.bank import Bank
from mta.config import Run, parse_size
from mta.data.history import Person, check_distinct
from mta.distributed.executor import Executor, LocalExecutor
from mta.errors import (
    ClusterError,
    DataError,
    InputError,
    MtaError,
    PersonForgotten,
    PersonNotFound,
    StateCorrupt,
)
from mta.model.base import BaseModel
from mta.model.encoders import Encoder
from mta.personalize.adapters import check_bank
from mta.personalize.merge import check_merge, frozen_numbers
from mta.personalize.outcomes import Personalized, Updated
from mta.personalize.policies import is_saturated, policy_of
from mta.personalize.shots import ShotsJob, shots_of
from mta.personalize.stages import Stages
from mta.personalize.update import Action, StateUpdate
from mta.personalize.work import Cohort, WorkItem, settings_digest, settings_text
from mta.personalize.worker import open_stages, personalize_cohort, update_cohort
from mta.store import Store
from mta.store.run_checkpoints import RunCheckpoints
from mta.store.state import State
from mta.store.tombstones import NOTHING
from mta.system.progress import OnStep, Step
from mta.system.storage import in_threads
from mta.training.plan import parameters_of, plan_cohorts


class _Call(NamedTuple):
    """The people of a call, the tombstones when their items were read, and ids of people forgotten since then."""

    people: list[Person]
    since: Collection[str]
    forgotten: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class CohortPlan:
    """The cohorts to compute, a digest of the plan, and the number of texts that were shortened to fit.

    ``errors`` maps ids of people who are left out to the error of an item that does not fit.
    """

    cohorts: Sequence[Cohort] = ()
    digest: str = ""
    shortened: int = 0
    errors: dict[str, MtaError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Computed:
    """How many people each action was done for, and the people without a new state.

    These were ``forgotten`` meanwhile, their data made workers fail (``crashed``), or they have other ``errors``:
    training that diverged, a damaged state, or a state that another process saved meanwhile. Both map ids to errors.
    """

    actions: Counter[Action] = field(default_factory=Counter)
    forgotten: set[str] = field(default_factory=set)
    crashed: dict[str, MtaError] = field(default_factory=dict)
    errors: dict[str, MtaError] = field(default_factory=dict)


@lru_cache(1)
def _opener(run: Run, *where: Any) -> Callable[[], Stages]:
    """Return the same function for all passes of an update, so that these have the same workers."""
    return partial(open_stages, run, *where)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Stages 2 and 3 for many people. ``encoder`` is called only if the policy reads encodings.

    ``unsaved`` holds the states that are in no store.
    """

    base: BaseModel
    bank: Bank
    run: Run
    encoder: Callable[[], Encoder]
    store: Store | None = None
    executor: Executor = field(default_factory=LocalExecutor)
    unsaved: dict[str, State] = field(default_factory=dict)

    def state(self, person: str) -> State:
        """Return a person's state. Raises PersonNotFound, StateCorrupt, OtherBank."""
        if person in self.unsaved:
            return self.unsaved[person]
        if not self.store:
            raise PersonNotFound("no state is known for that person", hint="Call personalize for them first.")
        check_bank(state := self.store.load(person), self.bank.hash)
        return state

    def personalize(
        self,
        people: Sequence[Person],
        histories: Sequence[Person] = (),
        resume: bool = True,
        since: Collection[str] | None = None,
        on_step: OnStep | None = None,
    ) -> Personalized:
        """See ``Personalizer.personalize``."""
        call = self._call_for(people, since)
        self._save_histories(call, histories)
        settings = settings_text(self.base, self.run), self.run.seed

        def planned(person: Person) -> tuple[WorkItem, bool]:  # without the state: all of them would fill the memory
            state, version, _ = self._stored(person.id)
            item = WorkItem.of(person, self.bank, *settings, version=version)
            return item, state is not None and state.work == item.work

        found = list(in_threads(planned, call.people))
        everybody, missing = [item for item, _ in found], [item for item, is_current in found if not is_current]
        return self._personalize(call, everybody, missing, resume, on_step)

    def _personalize(
        self,
        call: _Call,
        everybody: Sequence[WorkItem],
        missing: Sequence[WorkItem],
        resume: bool = True,
        on_step: OnStep | None = None,
    ) -> Personalized:
        """Make the states of ``missing`` people anew; the others of ``everybody`` are up to date."""
        checkpoints = self._checkpoints(everybody, call.since)
        if checkpoints and not resume:
            checkpoints.drop()
        plan = self.plan(everybody, missing, checkpoints)
        done = self._compute(personalize_cohort, plan.cohorts, call.since, on_step, checkpoints)
        if checkpoints and not done.crashed:  # diverged training would diverge again: no cohort is kept for it
            checkpoints.finish()  # even without missing people: a run killed after its last state may have left files
        wanted = {item.person.id for item in missing}  # a resumed cohort has people who are up to date, too
        failed = {id: error for id, error in (done.crashed | plan.errors | done.errors).items() if id in wanted}
        up_to_date = {item.person.id for item in everybody if item.person.id not in wanted}
        forgotten = {*call.forgotten, *done.forgotten} - up_to_date
        return Personalized(
            trained=len(wanted - failed.keys() - forgotten),
            unchanged=len(everybody) - len(missing),
            shortened=plan.shortened,
            failed=failed,
            plan=plan.digest,
            forgotten=tuple(sorted(forgotten)),
        )

    def update(
        self,
        people: Sequence[Person],
        histories: Sequence[Person],
        fewer: bool,
        since: Collection[str] | None,
        on_step: OnStep | None,
    ) -> Updated:
        """See ``Personalizer.update``."""
        call = self._call_for(people, since)
        settings = settings_text(self.base, self.run), self.run.seed
        planned = in_threads(partial(self._work_for, settings, settings_digest(*settings), fewer), call.people)
        works = {person.id: work for person, work in zip(call.people, planned)}
        items = [work for work in works.values() if isinstance(work, WorkItem)]
        grown = [item for item in items if item.earlier]
        ahead = [id for id, work in works.items() if work == "ahead"]
        call = call._replace(people=[person for person in call.people if works[person.id] != "ahead"])
        self._save_histories(call, histories)
        plan = self.plan(grown, grown)
        done = self._compute(update_cohort, plan.cohorts, call.since, on_step)
        plain = [WorkItem.of(person, self.bank, *settings) for person in call.people]
        anew = {item.name: item for item in items if not item.earlier}
        begun = self._begin_anew([anew.get(one.name, one) for one in plain], [*anew.values()], call.since, on_step)
        return Updated(
            kept=done.actions["keep"],
            retrained=done.actions["retrain"],
            refreshed=done.actions["merge"] + done.actions["refresh"],
            begun=begun.trained,
            unchanged=sum(work == "unchanged" for work in works.values()),
            failed=done.crashed | plan.errors | done.errors | begun.failed,
            plan=plan.digest or begun.plan,
            forgotten=tuple(sorted({*call.forgotten, *done.forgotten, *begun.forgotten})),
            ahead=tuple(ahead),
        )

    def _begin_anew(
        self, everybody: Sequence[WorkItem], items: Sequence[WorkItem], since: Collection[str], on_step: OnStep | None
    ) -> Personalized:
        """Make the states of people who have none to continue from, except of people forgotten meanwhile.

        ``everybody`` names the run, so that it resumes after some of these people have got their states.
        """
        call = self._call_for([item.person for item in everybody], since)
        ids = {person.id for person in call.people}
        named, left = ([item for item in some if item.person.id in ids] for some in (everybody, items))
        return self._personalize(call, named, left, on_step=on_step)

    def plan(
        self,
        everybody: Sequence[WorkItem],
        missing: Sequence[WorkItem],
        checkpoints: RunCheckpoints | None = None,
    ) -> CohortPlan:
        """Return the cohorts that hold ``missing`` people, without those who have an item that does not fit.

        If a run over ``everybody`` was interrupted (``checkpoints``), its cohorts are used again: then a resumed run
        equals an uninterrupted one. Otherwise only the missing people are planned.
        """
        if not missing:
            return CohortPlan()
        named = {item.name: item for item in everybody}
        interrupted = checkpoints.plan() if checkpoints else None
        names = interrupted if interrupted and set(interrupted) <= set(named) else []
        chosen = [named[name] for name in names] if {item.name for item in missing} <= set(names) else list(missing)
        trained = parameters_of(self.base, self.run.stack.lora) if self.run.stack.enabled else 1
        jobs = self._jobs(chosen, errors := dict[str, MtaError]())  # made one by one, as they are planned
        plan = plan_cohorts(
            self.base,
            jobs,
            trained,
            parse_size(self.run.memory),
            below=frozen_numbers(self.bank, self.run.merge),
            most=self.executor.most,
            threads=self.executor.threads,
            on_gpu=self.executor.on_gpu,
        )
        if not plan.cohorts:
            return CohortPlan(errors=errors)
        if checkpoints:
            checkpoints.note([item.name for item in chosen])
        fitting = [item for item in chosen if item.person.id not in errors]
        wanted = {item.name for item in missing}
        planned = [tuple(fitting[n] for n in cohort) for cohort in plan.cohorts]
        needed = [items for items in planned if any(item.name in wanted for item in items)]
        cohorts = [Cohort(items, plan.tokens_per_batch, plan.threads) for items in needed]
        return CohortPlan(cohorts, plan.digest, plan.shortened, errors)

    def _jobs(self, items: Sequence[WorkItem], errors: dict[str, MtaError]) -> Iterator[ShotsJob]:
        """Yield the jobs of people whose items fit; add the others' errors to ``errors``."""
        alternatives = policy_of(self.run.merge).labels
        for item in items:
            try:
                yield shots_of(self.base, self.bank.task, item.new_items, alternatives, item.known_items)
            except DataError as error:
                errors[item.person.id] = error

    def _call_for(self, people: Sequence[Person], since: Collection[str] | None) -> _Call:
        """Check the people and sort them by id; leave out people who were forgotten since their items were read."""
        if (task := getattr(people, "task", None)) and task.identity != self.bank.task.identity:
            raise InputError(
                f"these people were read for task {task.name!r}, the bank's is {self.bank.task.name!r}",
                hint="Read them for the bank's:  mta.read_people(path, bank.task)",
            )
        people = list(people)
        if empty := sum(not person.items for person in people):
            raise DataError(
                f"{empty} of {len(people)} people have no item", hint="Leave them out, or give each of them an item."
            )
        check_distinct(people)
        check_merge(self.run.merge, len(self.bank), self.bank.task.labelled, self.bank.calibration is not None)
        ordered, store = sorted(people, key=lambda person: person.id), self.store
        if store is None:
            return _Call(ordered, NOTHING)
        since = store.tombstones.names() if since is None else since
        gone = store.tombstones.since([person.id for person in ordered], since)
        return _Call([person for person in ordered if person.id not in gone], since, gone)

    def _save_histories(self, call: _Call, histories: Sequence[Person]) -> None:
        """Save the histories of the people of a call."""
        if not histories:
            return
        if self.store is None:
            raise InputError("histories are kept in a store, and there is none", hint='Give one: store="people/"')
        store, ids = self.store, {person.id for person in call.people}

        def save(person: Person) -> None:
            with suppress(PersonForgotten):  # no state will be saved either, and that is reported
                store.save_history(person, call.since)

        store.identity(write=True)  # creates a new store's key, once
        for _ in store.files.each(save, [person for person in histories if person.id in ids]):
            pass

    def _checkpoints(self, everybody: Sequence[WorkItem], since: Collection[str]) -> RunCheckpoints | None:
        """Return the folder of a run over these people. Once one of them is forgotten, no checkpoint is written."""
        if (store := self.store) is None:
            return None
        ids = [item.person.id for item in everybody]
        return RunCheckpoints.of(
            store.files, [item.name for item in everybody], lambda: not store.tombstones.since(ids, since)
        )

    def _compute(
        self,
        function: Callable[[Stages, Cohort], Sequence[StateUpdate]],
        cohorts: Sequence[Cohort],
        since: Collection[str],
        on_step: OnStep | None,
        checkpoints: RunCheckpoints | None = None,
    ) -> _Computed:
        """Run ``function`` for all cohorts on the executor. Keeps the states that are in no store."""
        found = _Computed()
        if not cohorts:
            return found
        store = self.store
        url, identity = (store.files.url, store.identity(write=True)) if store else (None, "")
        where = self.bank.folder.resolve(), self.bank.hash, url, identity, frozenset(since)
        open_remote = _opener(self.base.as_loaded(self.run), *where)
        local = Stages(self.base, self.bank, self.run, self.encoder, on_step, checkpoints, store, since)
        done, total = 0, sum(map(len, cohorts))
        for n, outcome in enumerate(self.executor.run(function, cohorts, local, open_remote), 1):
            done += len(outcome.piece)
            if outcome.error:
                error = ClusterError(outcome.error, hint="The log of the cluster's workers says more:  ray logs")
                found.crashed.update({item.person.id: error for item in outcome.piece.items})
            if on_step and not self.executor.in_process:
                on_step("fleet", Step(n, len(outcome.piece), done, total))
            for item, made in zip(outcome.piece.items, outcome.result or ()):
                if isinstance(made.error, PersonForgotten):
                    found.forgotten.add(item.person.id)
                elif made.error:
                    found.errors[item.person.id] = made.error
                else:
                    found.actions[made.action] += 1
                    if made.state:
                        self.unsaved[item.person.id] = made.state
        return found

    def _stored(self, person: str) -> tuple[State | None, int, int]:
        """Return a person's state, or None if it has to be computed anew; its version in the store, or 0; its shots.

        The shots are also those of a state of another bank.
        """
        if self.store is None:
            state = self.unsaved.get(person)
            return state, 0, state.shots if state else 0
        version = self.store.latest(person) or 0
        try:
            found = self.store.load(person, version) if version else None
        except (PersonNotFound, StateCorrupt):
            found = None
        if found is None:
            return None, version, 0
        return found if found.bank == self.bank.hash else None, version, found.shots

    def _work_for(
        self, settings: tuple[str, int], digest: str, fewer: bool, person: Person
    ) -> WorkItem | Literal["ahead", "unchanged"]:
        """Return the work that a person needs, an update or a beginning.

        "ahead" if their state, be it of another bank, is from more items than are given.
        """
        state, version, shots = self._stored(person.id)
        if shots > len(person.items) and not fewer:
            return "ahead"
        earlier, known_items = self._to_update(person, state, digest)
        if earlier and known_items == len(person.items):
            return "unchanged"
        item = WorkItem.of(person, self.bank, *settings, earlier, known_items, version)
        if not (self.store and earlier):
            return item
        return replace(item, earlier=replace(earlier, stack=None))  # stacks of everybody would fill a driver's memory

    def _to_update(self, person: Person, state: State | None, digest: str) -> tuple[State | None, int]:
        """Return the state to update and the number of items it holds; None if the person has to be begun anew."""
        if state is None or state.settings != digest or not state.losses:
            return None, 0
        if is_saturated(self.run.merge, state.w):
            return None, 0
        known_items = person.grown_from(state.history)
        return (state, known_items) if known_items else (None, 0)
