"""Run stages 2 and 3 for a cohort and save the states, in this process or in a worker of a cluster."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from mta.bank.bank import Bank
from mta.bank.format import check_base, read_info
from mta.config import Run
from mta.errors import BankMismatch, Diverged, PersonForgotten, StoreConflict, StoreError
from mta.model.base import BaseModel
from mta.personalize.cohort import Cohort, WorkItem
from mta.personalize.stages import Stages
from mta.personalize.update import StateUpdate, update_states
from mta.store import Store
from mta.store.state import State
from mta.store.tombstones import NOTHING, forgotten_meanwhile

NotSaved = Diverged | PersonForgotten


@dataclass(frozen=True, slots=True)
class Worker:
    """The stages, and the store for their states: None if the caller keeps the states.

    ``since`` are the tombstones that existed when the people's items were read (``mta.store.tombstones``).
    """

    stages: Stages
    store: Store | None
    since: Collection[str] = NOTHING


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a process on any machine needs to make the same worker. ``bank`` and ``store`` must mean the same there."""

    run: Run
    bank: Path
    hash: str
    store: str | None
    identity: str
    since: Collection[str] = NOTHING

    @classmethod
    def of(cls, base: BaseModel, bank: Bank, run: Run, store: Store | None, since: Collection[str]) -> WorkerSpec:
        """Describe a worker of this process. ``run`` then names the base as it was loaded."""
        url, identity = (store.files.url, store.identity(write=True)) if store else (None, "")
        return cls(base.as_loaded(run), bank.folder.resolve(), bank.hash, url, identity, since)

    def open(self) -> Worker:
        """Load base and bank. Raises BankMismatch or StoreError if another bank or store is found, and load errors."""
        store = Store(self.store) if self.store is not None else None
        if store and store.identity() != self.identity:
            raise StoreError(
                f"a worker found another store, or none, at {self.store}",
                hint="Give an address that means the same on all machines: a shared disk, a bucket.",
            )
        info = read_info(self.bank)
        base = BaseModel.of(self.run, partial(check_base, self.bank, info, self.run.base))
        bank = Bank.open(self.bank, base)
        if bank.hash != self.hash:
            raise BankMismatch(
                f"a worker found bank {bank.hash[:8]}… at {self.bank}, expected {self.hash[:8]}…",
                hint="Give workers the same folder: a shared disk, or a copy in their image.",
            )
        return Worker(
            Stages(base, bank, self.run, cache(partial(bank.encoder, base, self.run.encoder))), store, self.since
        )


def personalize_cohort(worker: Worker, cohort: Cohort) -> Sequence[State | NotSaved | None]:
    """Make the states of a cohort and save them. Returns states only if the worker has no store.

    Returns a ``NotSaved`` for each person whose training diverged or who was forgotten meanwhile. Raises Diverged if
    the training of several people diverged and of all of them: then the cause is not one person's data.
    """
    states = worker.stages.states(cohort)
    if len(states) > 1 and all(isinstance(state, Diverged) for state in states):
        worker.stages.remove_checkpoint(cohort)  # a checkpoint of diverged parameters must not be resumed
        raise next(state for state in states if isinstance(state, Diverged))
    if worker.store is None:
        return states
    outcomes = [_saved(worker, item, state) for item, state in zip(cohort.items, states)]
    worker.stages.remove_checkpoint(cohort)  # only now: a run killed earlier resumes from the checkpoint
    return outcomes


def update_cohort(worker: Worker, cohort: Cohort) -> Sequence[StateUpdate]:
    """Update the states of people whose histories have grown, and save the new states if there is a store.

    ``StateUpdate.state`` is a ``NotSaved`` for people whose training diverged or who were forgotten meanwhile.
    """
    store = worker.store
    if store is None:
        return update_states(worker.stages, cohort)
    gone = store.tombstones.since([item.person.id for item in cohort.items], worker.since)
    here = [item for item in cohort.items if item.person.id not in gone]
    whole = tuple(replace(item, before=_before(store, item)) for item in here)
    made = update_states(worker.stages, replace(cohort, items=whole)) if whole else []
    found = {item.person.id: replace(one, state=_saved(worker, item, one.state)) for item, one in zip(here, made)}
    return [found.get(item.person.id) or _not_updated(item) for item in cohort.items]


def _before(store: Store, item: WorkItem) -> State:
    """Load the whole state that an update starts from. Raises StoreConflict if that version holds another state."""
    state = store.load(item.person.id, item.version)
    if item.before is None or state.work != item.before.work:
        raise _overtaken(item)
    return state


def _not_updated(item: WorkItem) -> StateUpdate:
    """Return the outcome for a person who was forgotten before the update began."""
    assert item.before is not None
    assert item.before.losses is not None
    return StateUpdate("keep", item.before.losses, forgotten_meanwhile())


def _overtaken(item: WorkItem) -> StoreConflict:
    return StoreConflict(
        f"a newer version of {item.person.id!r} was saved meanwhile; what was made from the one before was not",
        hint="Update again: it goes on from the newer one.",
    )


def _saved(worker: Worker, item: WorkItem, state: State | NotSaved | None) -> NotSaved | None:
    """Save a state; return why there is none. Raises StoreConflict if the store has a newer version."""
    if worker.store is None or not isinstance(state, State):
        return None if isinstance(state, State) else state
    store, id = worker.store, item.person.id
    try:
        store.tombstones.check(id, worker.since)
        if item.before and store.latest(id) != item.version and store.load(id).work != item.work:
            raise _overtaken(item)
        store.save(id, state, worker.since)
    except PersonForgotten as gone:
        return gone
    return None
