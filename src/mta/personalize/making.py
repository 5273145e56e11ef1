"""How states come about, for many people at once: anew, or from the states they have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace

from mta.bank.bank import Bank
from mta.config import Run
from mta.data.history import Person
from mta.distributed.executor import Executor, Outcome, R
from mta.errors import DataError, InputError, OtherBank, PersonForgotten, PersonNotFound, StateCorrupt
from mta.model.base import BaseModel
from mta.model.encoders import Encoder
from mta.personalize.merge import check_merge
from mta.personalize.pipeline import Cohort, Stages, Wanted, digest_of, settings_of
from mta.personalize.worker import Copies, Desk, Failed, renew, work_through
from mta.store import Store
from mta.store.state import State
from mta.store.tombstones import NOTHING
from mta.store.workspace import Work
from mta.training.trainer import OnStep, Step


@dataclass(frozen=True, slots=True)
class Personalized:
    """What ``personalize`` did: how many people were trained, how many were there already, how many texts were cut.

    ``failed`` are those whose data made workers of a cluster fail, and how; ``plan`` says who were trained together.
    ``forgotten`` are the ids of people who were forgotten after their items came in: no state was saved for them.
    """

    trained: int
    unchanged: int
    shortened: int
    failed: dict[str, str] = field(default_factory=dict)
    plan: str = field(default="", compare=False)
    forgotten: tuple[str, ...] = ()

    def __str__(self) -> str:
        up = f"{self.trained} people personalized, {self.unchanged} were up to date"
        return f"{up}; {self.shortened} texts were shortened"


@dataclass(frozen=True, slots=True)
class Updated:
    """What ``update`` did for those with new items (``growth`` says what that means), and who was begun or had none."""

    kept: int
    retrained: int
    refreshed: int
    begun: int
    unchanged: int
    failed: dict[str, str] = field(default_factory=dict)
    plan: str = field(default="", compare=False)
    forgotten: tuple[str, ...] = ()

    def __str__(self) -> str:
        new = f"{self.kept} kept, {self.retrained} retrained, {self.refreshed} refreshed"
        return f"of people with new items {new}; {self.begun} personalized anew, {self.unchanged} had no new items"


def counts(done: Personalized | Updated) -> dict[str, int]:
    """How many people, without saying who."""
    told = {name: value for name, value in asdict(done).items() if name != "plan"}
    return told | {"failed": len(done.failed), "forgotten": len(done.forgotten)}


@dataclass(frozen=True, slots=True)
class Maker:
    """What makes a Personalizer's states: ``state`` finds the one there is, ``unsaved`` takes those no store does."""

    base: BaseModel
    bank: Bank
    run: Run
    encoder: Callable[[], Encoder]
    store: Store | None
    executor: Executor
    unsaved: dict[str, State]
    state: Callable[[str], State]
    on_step: OnStep | None = None

    def personalize(
        self,
        people: Sequence[Person],
        keep_histories: bool = False,
        resume: bool = True,
        since: Collection[str] | None = None,
    ) -> Personalized:
        """``Personalizer.personalize``."""
        _check(people)
        check_merge(self.run.merge, len(self.bank), self.bank.task.labelled)
        begun = self._begun(people, since)
        ordered = begun.people
        how = self.bank, settings_of(self.base, self.run), self.run.seed
        everybody = [Wanted.of(person, *how) for person in ordered]
        if keep_histories:
            self._keep_histories(begun)
        missing = [wanted for wanted in everybody if not self._has(wanted)]
        work = self._work(everybody, begun.since)
        if work and not resume:
            work.drop()
        if not missing:
            if work:
                work.finish()  # a run that was killed after its last state may have left something
            return Personalized(0, len(ordered), 0, forgotten=begun.forgotten)
        stages = Stages(self.base, self.bank, self.run, self.encoder(), self.on_step, work)
        cohorts = stages.cohorts(everybody, missing, self.executor.most, self.executor.threads)
        found = _Failures()
        for outcome in self._outcomes(work_through, stages, cohorts.lacking(missing), found, begun.since):
            self._take(outcome.piece, outcome.result or (), found)
        if work and not found.workers:  # who diverged would again: nobody's cohort is computed anew for them
            work.finish()
        asked = {wanted.person.id for wanted in missing}
        failed = {id: error for id, error in (found.workers | found.diverged).items() if id in asked}  # not up to date
        gone = found.forgotten & asked
        done = len(missing) - len(failed) - len(gone), len(ordered) - len(missing), cohorts.cut
        return Personalized(*done, failed, cohorts.plan.digest, tuple(sorted({*begun.forgotten, *gone})))

    def update(
        self, people: Sequence[Person], keep_histories: bool = False, since: Collection[str] | None = None
    ) -> Updated:
        """``Personalizer.update``."""
        _check(people)
        given = self._begun(people, since)
        if keep_histories:
            self._keep_histories(given)
        grown, begin, unchanged = list[Wanted](), list[Person](), 0
        how = self.bank, settings_of(self.base, self.run), self.run.seed
        settings = digest_of(*how[1:])
        for person in given.people:
            before, known = self._known(person, settings)
            if before is None:
                begin.append(person)
            elif known < len(person.items):
                grown.append(self._light(Wanted.of(person, *how, before, known)))
            else:
                unchanged += 1
        actions, found, plan = Counter[str](), _Failures(), ""
        if grown:
            stages = Stages(self.base, self.bank, self.run, self.encoder(), self.on_step)
            cohorts = stages.cohorts(grown, grown, self.executor.most, self.executor.threads)
            plan = cohorts.plan.digest
            for outcome in self._outcomes(renew, stages, cohorts.lacking(grown), found, given.since):
                made = outcome.result or ()
                actions.update(one.action for one in made if not isinstance(one.state, Failed))
                self._take(outcome.piece, [one.state for one in made], found)
        first = self.personalize(begin, since=given.since) if begin else Personalized(0, 0, 0)
        done = actions["keep"], actions["retrain"], actions["refresh"], first.trained, unchanged + first.unchanged
        gone = tuple(sorted({*given.forgotten, *found.forgotten, *first.forgotten}))
        return Updated(*done, found.workers | found.diverged | first.failed, plan or first.plan, gone)

    def _begun(self, people: Sequence[Person], since: Collection[str] | None) -> _Begun:
        """The people in the order of their ids, without those who were forgotten since their items came in."""
        ordered = sorted(people, key=lambda person: person.id)
        if self.store is None:
            return _Begun(ordered, NOTHING, ())
        known = self.store.tombstones.names() if since is None else since
        gone = self.store.tombstones.since([person.id for person in ordered], known)
        return _Begun([person for person in ordered if person.id not in gone], known, tuple(sorted(gone)))

    def _work(self, everybody: Sequence[Wanted], since: Collection[str]) -> Work | None:
        """Where a run over these people is gone on with; no checkpoint stays once one of them is forgotten."""
        if (store := self.store) is None:
            return None
        ids = [wanted.person.id for wanted in everybody]
        return Work.of(store.files, [w.name for w in everybody], lambda: not store.tombstones.since(ids, since))

    def _outcomes(
        self,
        function: Callable[[Desk, Cohort], R],
        stages: Stages,
        cohorts: Sequence[Cohort],
        found: _Failures,
        since: Collection[str],
    ) -> Iterator[Outcome[Cohort, R]]:
        """``function`` for all cohorts, wherever the executor works; notes in ``found`` who failed, and how."""
        here = Desk(stages, self.store, since)
        elsewhere = Copies.of(self.base, self.bank, self.run, self.store, since)
        done, total = 0, sum(map(len, cohorts))
        for n, outcome in enumerate(self.executor.run(function, cohorts, here, elsewhere), 1):
            done += len(outcome.piece)
            if outcome.error:
                found.workers |= {wanted.person.id: outcome.error for wanted in outcome.piece.wanted}
            if self.on_step and not self.executor.in_process:
                self.on_step("fleet", Step(n, len(outcome.piece), done, total))
            yield outcome

    def _take(self, cohort: Cohort, made: Sequence[State | Failed | None], found: _Failures) -> None:
        """Keep the states that no store has; note in ``found`` who diverged, and how, and who was forgotten."""
        for wanted, one in zip(cohort.wanted, made):
            if isinstance(one, PersonForgotten):
                found.forgotten.add(wanted.person.id)
            elif isinstance(one, State):
                self.unsaved[wanted.person.id] = one
            elif one:
                found.diverged[wanted.person.id] = str(one)

    def _known(self, person: Person, settings: str) -> tuple[State | None, int]:
        """The state of these settings to go on from, and how many items it was made of; None to begin anew."""
        try:
            state = self.state(person.id)
        except (PersonNotFound, StateCorrupt, OtherBank):
            return None, 0
        known = person.grown_from(state.history) if state.settings == settings and state.losses else 0
        return (state, known) if known else (None, 0)

    def _light(self, wanted: Wanted) -> Wanted:
        """Without the stack, where a worker finds it in the store: everybody's would fill the memory of a driver."""
        if not (self.store and wanted.before):
            return wanted
        version = self.store.latest(wanted.person.id) or 0
        return replace(wanted, before=replace(wanted.before, stack=None), version=version)

    def _has(self, wanted: Wanted) -> bool:
        try:
            return self.state(wanted.person.id).work == wanted.work
        except (PersonNotFound, StateCorrupt, OtherBank):
            return False

    def _keep_histories(self, begun: _Begun) -> None:
        if not self.store:
            raise InputError("histories are kept in a store, and there is none", hint='Give one: store="people/"')
        for person in begun.people:
            with suppress(PersonForgotten):  # nor will a state be saved, and that is reported
                self.store.save_history(person, begun.since)


@dataclass(frozen=True, slots=True)
class _Begun:
    """The people of a call, the tombstones that were there when their items came in, and who was forgotten since."""

    people: list[Person]
    since: Collection[str]
    forgotten: tuple[str, ...]


@dataclass(slots=True)
class _Failures:
    """Who has no state, and why: a worker failed, training diverged, the person was forgotten."""

    workers: dict[str, str] = field(default_factory=dict)
    diverged: dict[str, str] = field(default_factory=dict)
    forgotten: set[str] = field(default_factory=set)


def _check(people: Sequence[Person]) -> None:
    if empty := sum(not person.items for person in people):
        raise DataError(
            f"{empty} of {len(people)} people have no item", hint="Leave them out, or give each of them an item."
        )
    if len({person.id for person in people}) < len(people):
        raise DataError("a person is given twice", hint="Put all items of a person into one history.")
