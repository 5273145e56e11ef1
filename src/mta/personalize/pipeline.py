"""Personalize or update many people: plan cohorts, compute them on an executor, and collect the outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from mta.bank.bank import Bank
from mta.bank.format import check_base
from mta.config import Run, parse_size
from mta.data.earlier import with_history
from mta.data.history import Item, Person, check_distinct
from mta.distributed.executor import Executor, LocalExecutor
from mta.errors import ClusterError, DataError, InputError, MtaError, PersonForgotten, PersonNotFound, StateCorrupt
from mta.model.base import BaseModel
from mta.model.encoders import Encoder
from mta.personalize.adapters import check_bank
from mta.personalize.merge import check_merge, frozen_numbers
from mta.personalize.outcomes import Personalized, Updated
from mta.personalize.policies import is_saturated, policy_of
from mta.personalize.shots import ShotsJob, shots_of
from mta.personalize.stages import Stages
from mta.personalize.update import Action, StateUpdate
from mta.personalize.work import Cohort, StateInputs, WorkItem
from mta.personalize.worker import personalize_cohort, update_cohort
from mta.store import Session, Store
from mta.store.run_checkpoints import RunCheckpoints
from mta.store.state import State
from mta.system.progress import OnStep, Step
from mta.system.storage import in_threads
from mta.training.plan import parameters_of, plan_cohorts


@dataclass(slots=True)
class _Computed:
    """How many people each action was done for, and the people without a new state.

    ``plan`` is a digest of the cohorts; ``shortened`` counts texts. People were ``forgotten`` meanwhile, their data
    made workers fail (``crashed``), or they have other ``errors``: an item that does not fit, training that diverged,
    a damaged state, or a state that another process saved meanwhile. Both map ids to errors.
    """

    plan: str = ""
    shortened: int = 0
    actions: Counter[Action] = field(default_factory=Counter)
    forgotten: set[str] = field(default_factory=set)
    crashed: dict[str, MtaError] = field(default_factory=dict)
    errors: dict[str, MtaError] = field(default_factory=dict)

    def add(self, person: str, made: StateUpdate) -> None:
        """Count what was done for a person."""
        if isinstance(made.error, PersonForgotten):
            self.forgotten.add(person)
        elif made.error:
            self.errors[person] = made.error
        else:
            self.actions[made.action] += 1


class Pipeline:
    """Stages 2 and 3 for many people, over a base, a bank, and optionally a store of people's states.

    ``run`` defaults to the bank's settings. ``executor`` runs the cohorts, for example on a cluster
    (``mta.distributed.ray``). Without a store, the states stay in memory.
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
        check_base(bank.folder, bank.info, base.name, base.fingerprint)
        self.base, self.bank = base, bank
        self.run = bank.with_calibrated_settings(run)
        self.store = Store(store) if isinstance(store, (str, Path)) else store
        self.executor = executor or LocalExecutor()
        self._encoder = encoder
        self._unsaved = dict[str, State]()  # states that are in no store
        self._latest = dict[str, tuple[Item, ...]]()  # likewise, items that prompts show

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder of the anchors' vectors. Raises BankMismatch for another encoder, ModelError for other models."""
        return self.bank.encoder(self.base, self.run.encoder, self._encoder)

    def state(self, person: str) -> State:
        """Return a person's state. Raises PersonNotFound, StateCorrupt, OtherBank."""
        if person in self._unsaved:
            return self._unsaved[person]
        if not self.store:
            raise PersonNotFound("no state is known for that person", hint="Call personalize for them first.")
        check_bank(state := self.store.load(person), self.bank.hash)
        return state

    def personalize(
        self,
        people: Sequence[Person],
        *,
        histories: Sequence[Person] = (),
        resume: bool = True,
        session: Session | None = None,
        on_step: OnStep | None = None,
    ) -> Personalized:
        """Run stages 2 and 3 for all ``people``, with their histories as shots.

        States that ``personalize`` made from the same shots, bank, and settings are kept. Other states are computed in
        cohorts that fit the memory. With a store, a killed run resumes with the same cohorts, unless ``resume`` is
        False. ``histories`` are stored until their people are forgotten. Give ``people`` again, or the whole histories
        if ``people`` have only the latest items. ``session`` is a ``store.session()`` that began before the items were
        read: people forgotten since then get no state.
        Raises Diverged if the training of all people of a cohort diverges, DataError for a person without items,
        MemoryBudgetError, ConfigError, StoreError, ClusterError.
        """
        session = session or (self.store.session() if self.store else None)
        people, gone = self._checked(people, session)
        self._save_histories(people, histories, session)
        inputs = StateInputs.of(self.base, self.bank, self.run)

        def planned(person: Person) -> tuple[WorkItem, bool]:  # without the state: all of them would fill the memory
            state, version, _ = self._stored(person.id)
            item = WorkItem(person, inputs.key(person.digest(), None), version=version)
            return item, state is not None and state.work == item.work

        items = list(in_threads(planned, people))
        missing = [item for item, is_current in items if not is_current]
        done = self._begin([item for item, _ in items], missing, session, on_step, resume)
        return replace(done, forgotten=tuple(sorted({*gone, *done.forgotten})))

    def _begin(
        self,
        everybody: Sequence[WorkItem],
        missing: Sequence[WorkItem],
        session: Session | None,
        on_step: OnStep | None,
        resume: bool = True,
    ) -> Personalized:
        """Make the states of ``missing`` people anew; the others of ``everybody`` are up to date."""
        checkpoints = self._checkpoints(everybody, session)
        if checkpoints and not resume:
            checkpoints.drop()
        done = self._compute(personalize_cohort, everybody, missing, session, on_step, checkpoints)
        if checkpoints and not done.crashed:  # diverged training would diverge again: no cohort is kept for it
            checkpoints.drop()  # even without missing people: a run killed after its last state may have left files
        wanted = {item.person.id for item in missing}  # a resumed cohort has people who are up to date, too
        failed = {id: error for id, error in (done.crashed | done.errors).items() if id in wanted}
        return Personalized(
            trained=len(wanted - failed.keys() - done.forgotten),
            unchanged=len(everybody) - len(missing),
            shortened=done.shortened,
            failed=failed,
            plan=done.plan,
            forgotten=tuple(sorted(done.forgotten & wanted)),
        )

    def update(
        self,
        people: Sequence[Person],
        *,
        histories: Sequence[Person] = (),
        fewer: bool = False,
        session: Session | None = None,
        on_step: OnStep | None = None,
    ) -> Updated:
        """Update people's states; compute only their new items (``mta.personalize.update``).

        People are personalized anew if they have no state, or if the state has another bank, other settings, or other
        earlier items. A state made from more items than are given is kept (``Updated.ahead``), unless ``fewer``.
        ``session`` and the errors are those of ``personalize``.
        """
        session = session or (self.store.session() if self.store else None)
        people, gone = self._checked(people, session)
        inputs = StateInputs.of(self.base, self.bank, self.run)
        planned = in_threads(lambda person: self._work_for(person, inputs, fewer), people)
        works = {person.id: work for person, work in zip(people, planned)}
        people = [person for person in people if works[person.id] != "ahead"]
        self._save_histories(people, histories, session)
        items = [work for work in works.values() if isinstance(work, WorkItem)]
        grown, anew = [item for item in items if item.earlier], [item for item in items if not item.earlier]
        done = self._compute(update_cohort, grown, grown, session, on_step)
        # Everybody names the run, so that it resumes after some of these people have got their states.
        named = {item.person.id: item for item in anew}
        everybody = [named.get(p.id) or WorkItem(p, inputs.key(p.digest(), None)) for p in people]
        begun = self._begin(everybody, anew, session, on_step)
        return Updated(
            kept=done.actions["keep"],
            retrained=done.actions["retrain"],
            refreshed=done.actions["merge"] + done.actions["refresh"],
            begun=begun.trained,
            unchanged=sum(work == "unchanged" for work in works.values()),
            failed=done.crashed | done.errors | begun.failed,
            plan=done.plan or begun.plan,
            forgotten=tuple(sorted({*gone, *done.forgotten, *begun.forgotten})),
            ahead=tuple(id for id, work in works.items() if work == "ahead"),
        )

    def _checked(self, people: Sequence[Person], session: Session | None) -> tuple[list[Person], set[str]]:
        """Check the people and sort them by id; add the earlier items that the bank's prompts show.

        Those who were forgotten since their items were read are returned apart.
        """
        if (task := getattr(people, "task", None)) and task.identity != self.bank.task.identity:
            raise InputError(
                f"these people were read for task {task.name!r}, the bank's is {self.bank.task.name!r}",
                hint="Read them for the bank's:  mta.read_people(path, bank.task)",
            )
        ordered = sorted(people, key=lambda person: person.id)
        if empty := sum(not person.items for person in ordered):
            raise DataError(
                f"{empty} of {len(ordered)} people have no item", hint="Leave them out, or give each of them an item."
            )
        check_distinct(ordered)
        check_merge(self.run.merge, len(self.bank), self.bank.task.labelled, self.bank.calibration is not None)
        gone = session.forgotten([person.id for person in ordered]) if session else set()
        most, known = self.bank.history, [person for person in ordered if person.id not in gone]
        if most and self.store is None:
            self._latest |= {person.id: person.items[-most:] for person in known}
        return [with_history(self.bank.task, person, most) for person in known], gone

    def _save_histories(self, people: Sequence[Person], histories: Sequence[Person], session: Session | None) -> None:
        """Save the histories of these people."""
        if not histories:
            return
        if session is None:
            raise InputError("histories are kept in a store, and there is none", hint='Give one: store="people/"')

        def save(person: Person) -> None:
            with suppress(PersonForgotten):  # no state will be saved either, and that is reported
                session.save_history(person)

        ids = {person.id for person in people}
        session.store.identity(write=True)  # creates a new store's key, once
        for _ in session.store.files.each(save, [person for person in histories if person.id in ids]):
            pass

    def _checkpoints(self, everybody: Sequence[WorkItem], session: Session | None) -> RunCheckpoints | None:
        """Return the folder of a run over these people. Once one of them is forgotten, no checkpoint is written."""
        if session is None:
            return None
        ids, names = [item.person.id for item in everybody], [item.name for item in everybody]
        return RunCheckpoints.of(session.store.files, names, lambda: not session.forgotten(ids))

    # -- compute -------------------------------------------------------------------------------------------------------

    def _compute(
        self,
        function: Callable[[Stages, Cohort], Sequence[StateUpdate]],
        everybody: Sequence[WorkItem],
        missing: Sequence[WorkItem],
        session: Session | None,
        on_step: OnStep | None,
        checkpoints: RunCheckpoints | None = None,
    ) -> _Computed:
        """Run ``function`` for the cohorts of ``missing`` people on the executor. Keep states that are in no store."""
        done = _Computed()
        if not (cohorts := self._cohorts(everybody, missing, checkpoints, done)):
            return done
        if session:
            session.store.identity(write=True)  # a new store's key, before workers look for it
        stages = Stages(self.base, self.bank, self.run, lambda: self.encoder, on_step, checkpoints, session)
        count, total = 0, sum(map(len, cohorts))
        for n, outcome in enumerate(self.executor.run(function, cohorts, stages), 1):
            count += len(outcome.piece)
            if outcome.error:
                error = ClusterError(outcome.error, hint="The log of the cluster's workers says more:  ray logs")
                done.crashed.update({item.person.id: error for item in outcome.piece.items})
            if on_step and not self.executor.in_process:
                on_step("fleet", Step(n, len(outcome.piece), count, total))
            for item, made in zip(outcome.piece.items, outcome.result or ()):
                done.add(item.person.id, made)
                if made.state:
                    self._unsaved[item.person.id] = made.state
        return done

    def _cohorts(
        self, everybody: Sequence[WorkItem], missing: Sequence[WorkItem], kept: RunCheckpoints | None, done: _Computed
    ) -> list[Cohort]:
        """Return the cohorts that hold ``missing`` people, without those who have an item that does not fit.

        If a run over ``everybody`` was interrupted (``kept``), its cohorts are used again: then a resumed run
        equals an uninterrupted one. Otherwise only the missing people are planned.
        """
        if not missing:
            return []
        named = {item.name: item for item in everybody}
        interrupted = kept.plan() if kept else None
        names = interrupted if interrupted and set(interrupted) <= set(named) else []
        chosen = [named[name] for name in names] if {item.name for item in missing} <= set(names) else list(missing)
        jobs = self._jobs(chosen, done.errors)  # made one by one, as they are planned: all would fill the memory
        trained = parameters_of(self.base, self.run.stack.lora) if self.run.stack.enabled else 1
        memory, below = parse_size(self.run.memory), frozen_numbers(self.bank, self.run.merge)
        most, threads, gpu = self.executor.most, self.executor.threads, self.executor.on_gpu
        plan = plan_cohorts(self.base, jobs, trained, memory, below=below, most=most, threads=threads, on_gpu=gpu)
        if not plan.cohorts:
            return []
        if kept:
            kept.note([item.name for item in chosen])
        done.plan, done.shortened = plan.digest, plan.shortened
        fitting = [item for item in chosen if item.person.id not in done.errors]
        wanted = {item.name for item in missing}
        planned = [tuple(fitting[n] for n in cohort) for cohort in plan.cohorts]
        needed = [items for items in planned if any(item.name in wanted for item in items)]
        return [Cohort(items, plan.tokens_per_batch, plan.threads) for items in needed]

    def _jobs(self, items: Sequence[WorkItem], errors: dict[str, MtaError]) -> Iterator[ShotsJob]:
        """Yield the jobs of people whose items fit; add the others' errors to ``errors``."""
        alternatives = policy_of(self.run.merge).labels
        for item in items:
            try:
                yield shots_of(self.base, self.bank.task, item.new_items, alternatives, item.known_items)
            except DataError as error:
                errors[item.person.id] = error

    # -- what a person needs -------------------------------------------------------------------------------------------

    def _stored(self, person: str) -> tuple[State | None, int, int]:
        """Return a person's state, or None if it has to be computed anew; its version in the store, or 0; its shots.

        The shots are also those of a state of another bank.
        """
        if self.store is None:
            state = self._unsaved.get(person)
            return state, 0, state.shots if state else 0
        version = self.store.latest(person) or 0
        try:
            state = self.store.load(person, version) if version else None
        except (PersonNotFound, StateCorrupt):
            state = None
        if state is None:
            return None, version, 0
        return state if state.bank == self.bank.hash else None, version, state.shots

    def _work_for(self, person: Person, inputs: StateInputs, fewer: bool) -> WorkItem | Literal["ahead", "unchanged"]:
        """Return the work that a person needs, an update or a beginning.

        "ahead" if their state, be it of another bank, is from more items than are given.
        """
        state, version, shots = self._stored(person.id)
        if shots > len(person.items) and not fewer:
            return "ahead"
        can_grow = state and state.settings == inputs.digest and not is_saturated(self.run.merge, state.w)
        known_items = person.grown_from(state.history) if state and can_grow else 0
        if state is None or not known_items:
            return WorkItem(person, inputs.key(person.digest(), None), version=version)
        if known_items == len(person.items):
            return "unchanged"
        earlier = replace(state, stack=None) if self.store else state  # everybody's stacks would fill the memory
        return WorkItem(person, inputs.key(person.digest(), state), earlier, known_items, version)
