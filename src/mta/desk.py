"""Where a cohort is worked through: what stages 2 and 3 need, at hand here or made again by a worker elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mta.bank.bank import Bank
from mta.base import BaseModel
from mta.config import Run
from mta.errors import BankMismatch, Diverged, StoreConflict, StoreError
from mta.growth import Renewed, renewed
from mta.stages import Cohort, Stages, Wanted
from mta.state import State
from mta.store import Store


@dataclass(frozen=True, slots=True)
class Desk:
    """The stages, and the store that states go to: None where whoever asked keeps them."""

    stages: Stages
    store: Store | None


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

    @classmethod
    def of(cls, base: BaseModel, bank: Bank, run: Run, store: Store | None) -> Copies:
        """Copies of a desk in this process."""
        url, identity = (store.files.url, store.identity(write=True)) if store else (None, "")
        return cls(base.as_loaded(run), bank.folder.resolve(), bank.hash, url, identity)

    def __call__(self) -> Desk:
        """Raises BankMismatch, StoreError if what lies there is another, and what opening base and bank raises."""
        store = Store(self.store) if self.store is not None else None
        if store and store.identity() != self.identity:
            raise StoreError(
                f"a worker found another store, or none, at {self.store}",
                hint="Give an address that means the same on all machines: a shared disk, a bucket.",
            )
        base = BaseModel.of(self.run)
        bank = Bank.open(self.bank, base)
        if bank.hash != self.hash:
            raise BankMismatch(
                f"a worker found bank {bank.hash[:8]}… at {self.bank}, expected {self.hash[:8]}…",
                hint="Give workers the same folder: a shared disk, or a copy in their image.",
            )
        stages = Stages(base, bank, self.run, bank.encoder(base, self.run.encoder))
        return Desk(stages, store)


def renew(desk: Desk, cohort: Cohort) -> Sequence[Renewed]:
    """What is to be done for people whose histories have grown, done; where there is a store, new states go there.

    Who diverged is given back as that.
    """
    store = desk.store
    if store is None:
        return renewed(desk.stages, cohort)
    whole = tuple(replace(wanted, before=_before(store, wanted)) for wanted in cohort.wanted)
    found = renewed(desk.stages, replace(cohort, wanted=whole))
    for wanted, one in zip(cohort.wanted, found):
        if isinstance(one.state, State):
            if store.latest(wanted.person.id) != wanted.version and store.load(wanted.person.id).work != wanted.work:
                raise _overtaken(wanted)
            store.save(wanted.person.id, one.state)
    return [replace(one, state=_unsaved(one.state)) for one in found]


def _before(store: Store, wanted: Wanted) -> State:
    """The whole state somebody is gone on from, and no other of that number."""
    state = store.load(wanted.person.id, wanted.version)
    if wanted.before is None or state.work != wanted.before.work:
        raise _overtaken(wanted)
    return state


def _overtaken(wanted: Wanted) -> StoreConflict:
    return StoreConflict(
        f"a newer version of {wanted.person.id!r} was saved meanwhile; what was made from the one before was not",
        hint="Update again: it goes on from the newer one.",
    )


def work_through(desk: Desk, cohort: Cohort) -> Sequence[State | Diverged | None]:
    """Stages 2 and 3 for a cohort. States go to the desk's store; where there is none they are given back.

    Who diverged is given back as that; raises Diverged if everybody of several did, for then it is nobody's data.
    """
    states = desk.stages.states(cohort)
    if len(states) > 1 and all(isinstance(one, Diverged) for one in states):
        raise next(one for one in states if isinstance(one, Diverged))
    if desk.store is None:
        return states
    for wanted, state in zip(cohort.wanted, states):
        if isinstance(state, State):
            desk.store.save(wanted.person.id, state)
    return [_unsaved(state) for state in states]


def _unsaved(state: State | Diverged | None) -> Diverged | None:
    return state if isinstance(state, Diverged) else None
