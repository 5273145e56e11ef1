"""Where a cohort is worked through: what stages 2 and 3 need, at hand here or made again by a worker elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mta.bank.bank import Bank
from mta.base import BaseModel
from mta.config import Run
from mta.errors import BankMismatch
from mta.growth import Renewed, renewed
from mta.stages import Cohort, Stages
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

    @classmethod
    def of(cls, base: BaseModel, bank: Bank, run: Run, store: Store | None) -> Copies:
        """Copies of a desk in this process."""
        return cls(base.as_loaded(run), bank.folder.resolve(), bank.hash, store.files.url if store else None)

    def __call__(self) -> Desk:
        """Raises BankMismatch if what lies there is not what was asked for, and what opening base and bank raises."""
        base = BaseModel.of(self.run)
        bank = Bank.open(self.bank, base)
        if bank.hash != self.hash:
            raise BankMismatch(
                f"a worker found bank {bank.hash[:8]}… at {self.bank}, expected {self.hash[:8]}…",
                hint="Give workers the same folder: a shared disk, or a copy in their image.",
            )
        stages = Stages(base, bank, self.run, bank.encoder(base, self.run.encoder))
        return Desk(stages, Store(self.store) if self.store is not None else None)


def renew(desk: Desk, cohort: Cohort) -> Sequence[Renewed]:
    """What is to be done for people whose histories have grown, done; where there is a store, new states go there."""
    found = renewed(desk.stages, cohort)
    if desk.store is None:
        return found
    for wanted, one in zip(cohort.wanted, found):
        if one.state:
            desk.store.save(wanted.person.id, one.state)
    return [replace(one, state=None) for one in found]


def work_through(desk: Desk, cohort: Cohort) -> Sequence[State]:
    """Stages 2 and 3 for a cohort. States go to the desk's store; where there is none they are given back."""
    states = desk.stages.states(cohort)
    if desk.store is None:
        return states
    for wanted, state in zip(cohort.wanted, states):
        desk.store.save(wanted.person.id, state)
    return ()
