"""Run stages 2 and 3 for a cohort and save the states, in this process or in a worker of a cluster."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from mta.bank.bank import Bank
from mta.bank.format import check_base, read_info
from mta.config import Run
from mta.errors import (
    BankMismatch,
    Diverged,
    PersonForgotten,
    PersonNotFound,
    StateCorrupt,
    StoreConflict,
    StoreError,
)
from mta.model.base import BaseModel
from mta.personalize.stages import Stages
from mta.personalize.update import NotSaved, StateUpdate, update_states
from mta.personalize.work import Cohort, WorkItem
from mta.store import Store
from mta.store.state import State
from mta.store.store import overtaken
from mta.store.tombstones import NOTHING, forgotten_meanwhile

_SAME_FOLDER = (
    "Give workers the same folder: a shared disk, or a copy in their image. (A hub id is downloaded here only.)"
)


def open_stages(
    run: Run, bank: Path, hash: str, store: str | None, identity: str, since: Collection[str] = NOTHING
) -> Stages:
    """Load base and bank and open the store; paths and addresses must mean the same on all machines.

    Raises BankMismatch or StoreError if another bank or store is found, and load errors.
    """
    opened = Store(store) if store is not None else None
    if opened and opened.identity() != identity:
        raise StoreError(
            f"a worker found another store, or none, at {store}",
            hint="Give an address that means the same on all machines: a shared disk, a bucket.",
        )
    if not bank.is_dir():
        raise BankMismatch(f"a worker found no bank at {bank}", hint=_SAME_FOLDER)
    base = BaseModel.of(run, partial(check_base, bank, read_info(bank), run.base))
    found = Bank.open(bank, base)
    if found.hash != hash:
        raise BankMismatch(
            f"a worker found bank {found.hash[:8]}… at {bank}, expected {hash[:8]}…",
            hint=_SAME_FOLDER,
        )
    encoder = cache(partial(found.encoder, base, run.encoder))
    return Stages(base, found, run, encoder, store=opened, since=since)


def personalize_cohort(stages: Stages, cohort: Cohort) -> Sequence[StateUpdate]:
    """Make the states of a cohort, and save them if there is a store.

    Raises Diverged if the training of several people diverged and of all of them: the cause is not one person's data.
    """
    states = stages.states(cohort)
    if len(states) > 1 and all(isinstance(state, Diverged) for state in states):
        stages.remove_checkpoint(cohort)  # a checkpoint of diverged parameters must not be resumed
        raise next(state for state in states if isinstance(state, Diverged))
    made = _all_saved(stages, cohort.items, [StateUpdate.of("begin", state) for state in states])
    if stages.store:
        stages.remove_checkpoint(cohort)  # only now: a run killed earlier resumes from the checkpoint
    return made


def update_cohort(stages: Stages, cohort: Cohort) -> Sequence[StateUpdate]:
    """Update the states of people whose histories have grown, and save them if there is a store."""
    store = stages.store
    if store is None:
        return update_states(stages, cohort)
    forgotten = store.tombstones.since([item.person.id for item in cohort.items], stages.since)
    loaded = [forgotten_meanwhile() if item.person.id in forgotten else _earlier(store, item) for item in cohort.items]
    items = [replace(item, earlier=state) for item, state in zip(cohort.items, loaded) if isinstance(state, State)]
    made = iter(update_states(stages, replace(cohort, items=tuple(items))) if items else [])
    updates = [next(made) if isinstance(one, State) else StateUpdate("keep", error=one) for one in loaded]
    return _all_saved(stages, cohort.items, updates)


def _earlier(store: Store, item: WorkItem) -> State | NotSaved:
    """Load the whole state that an update starts from; return why not if that version is another state, or damaged."""
    try:
        state = store.load(item.person.id, item.version)
    except (PersonNotFound, StateCorrupt) as error:
        return error
    return overtaken(item.person.id) if item.earlier is None or state.work != item.earlier.work else state


def _all_saved(stages: Stages, items: Sequence[WorkItem], made: Sequence[StateUpdate]) -> list[StateUpdate]:
    """Save all new states, if there is a store; a bucket takes several at once, as each has to wait for its answers."""
    if (store := stages.store) is None:
        return list(made)
    return list(store.files.each(lambda pair: _saved(store, stages.since, *pair), list(zip(items, made))))


def _saved(store: Store, since: Collection[str], item: WorkItem, made: StateUpdate) -> StateUpdate:
    """Save the new state, if there is one; the update is returned without it, or with the error of saving.

    Errors: another process saved a newer version, or the person was forgotten.
    """
    if made.state is None:
        return made
    try:
        store.save(item.person.id, made.state, since, after=item.version)
    except (PersonForgotten, StoreConflict) as error:
        return replace(made, state=None, error=error)
    return replace(made, state=None)
