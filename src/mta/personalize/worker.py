"""Where a cohort is worked through: what stages 2 and 3 need, at hand here or made again by a worker elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mta.bank.bank import Bank
from mta.bank.format import check_base, read_info
from mta.config import Run
from mta.errors import BankMismatch, Diverged, PersonForgotten, StoreConflict, StoreError
from mta.model.base import BaseModel
from mta.personalize.pipeline import Cohort, Stages, Wanted
from mta.personalize.update import Renewed, renewed
from mta.store import Store
from mta.store.state import State
from mta.store.tombstones import NOTHING, forgotten_meanwhile

Failed = Diverged | PersonForgotten


@dataclass(frozen=True, slots=True)
class Desk:
    """The stages, and the store that states go to: None where the caller keeps them.

    ``since`` are the tombstones that were there when the people's items came in (``mta.store.tombstones``).
    """

    stages: Stages
    store: Store | None
    since: Collection[str] = NOTHING


@dataclass(frozen=True, slots=True)
class Copies:
    """Makes the same desk in another process, perhaps on another machine: called there, it loads base and bank.

    ``bank`` is a folder, and ``store`` an address, that mean the same there. ``run`` names the base as it was loaded.
    """

    run: Run
    bank: Path
    hash: str
    store: str | None
    identity: str
    since: Collection[str] = NOTHING

    @classmethod
    def of(cls, base: BaseModel, bank: Bank, run: Run, store: Store | None, since: Collection[str] = NOTHING) -> Copies:
        """Copies of a desk in this process."""
        url, identity = (store.files.url, store.identity(write=True)) if store else (None, "")
        return cls(base.as_loaded(run), bank.folder.resolve(), bank.hash, url, identity, since)

    def __call__(self) -> Desk:
        """Raises BankMismatch, StoreError if what lies there is another, and what opening base and bank raises."""
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
        stages = Stages(base, bank, self.run, bank.encoder(base, self.run.encoder))
        return Desk(stages, store, self.since)


def renew(desk: Desk, cohort: Cohort) -> Sequence[Renewed]:
    """What is to be done for people whose histories have grown, done; where there is a store, new states go there.

    Who diverged is given back as that, and so is a person who was forgotten meanwhile.
    """
    store = desk.store
    if store is None:
        return renewed(desk.stages, cohort)
    gone = store.tombstones.since([wanted.person.id for wanted in cohort.wanted], desk.since)
    here = [wanted for wanted in cohort.wanted if wanted.person.id not in gone]
    whole = tuple(replace(wanted, before=_before(store, wanted)) for wanted in here)
    made = renewed(desk.stages, replace(cohort, wanted=whole)) if whole else []
    found = {w.person.id: replace(one, state=_saved(desk, w, one.state)) for w, one in zip(here, made)}
    return [found.get(wanted.person.id) or _not_renewed(wanted) for wanted in cohort.wanted]


def _before(store: Store, wanted: Wanted) -> State:
    """The whole state somebody is gone on from, and no other of that number."""
    state = store.load(wanted.person.id, wanted.version)
    if wanted.before is None or state.work != wanted.before.work:
        raise _overtaken(wanted)
    return state


def _not_renewed(wanted: Wanted) -> Renewed:
    """Of a person who was forgotten before anything was done."""
    assert wanted.before is not None
    assert wanted.before.losses is not None
    return Renewed("keep", wanted.before.losses, forgotten_meanwhile())


def _overtaken(wanted: Wanted) -> StoreConflict:
    return StoreConflict(
        f"a newer version of {wanted.person.id!r} was saved meanwhile; what was made from the one before was not",
        hint="Update again: it goes on from the newer one.",
    )


def work_through(desk: Desk, cohort: Cohort) -> Sequence[State | Failed | None]:
    """Stages 2 and 3 for a cohort. States go to the desk's store; where there is none they are given back.

    Who diverged is given back as that, and so is a person who was forgotten meanwhile; raises Diverged if everybody of
    several did, for then it is nobody's data.
    """
    states = desk.stages.states(cohort)
    if len(states) > 1 and all(isinstance(one, Diverged) for one in states):
        desk.stages.remove_checkpoint(cohort)  # a checkpoint of diverged parameters must not be resumed
        raise next(one for one in states if isinstance(one, Diverged))
    if desk.store is None:
        return states
    outcomes = [_saved(desk, wanted, state) for wanted, state in zip(cohort.wanted, states)]
    desk.stages.remove_checkpoint(cohort)  # only now: a run killed earlier resumes from the checkpoint
    return outcomes


def _saved(desk: Desk, wanted: Wanted, state: State | Failed | None) -> Failed | None:
    """Save a state that was made; return why there is none. Raises StoreConflict if a newer version is there."""
    if desk.store is None or not isinstance(state, State):
        return None if isinstance(state, State) else state
    store, id = desk.store, wanted.person.id
    try:
        store.tombstones.check(id, desk.since)
        if wanted.before and store.latest(id) != wanted.version and store.load(id).work != wanted.work:
            raise _overtaken(wanted)
        store.save(id, state, desk.since)
    except PersonForgotten as gone:
        return gone
    return None
