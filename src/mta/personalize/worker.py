"""Run stages 2 and 3 for a cohort and save the states, in this process or in a worker of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mta.errors import Diverged, PersonForgotten, PersonNotFound, StateCorrupt, StoreConflict
from mta.personalize.stages import Stages
from mta.personalize.update import NotSaved, StateUpdate, update_states
from mta.personalize.work import Cohort, WorkItem
from mta.store import Store
from mta.store.state import State
from mta.store.store import overtaken
from mta.store.tombstones import forgotten_meanwhile


def personalize_cohort(stages: Stages, cohort: Cohort) -> Sequence[StateUpdate]:
    """Make the states of a cohort, and save them if there is a store.

    Raises Diverged if the training of several people diverged and of all of them: the cause is not one person's data.
    """
    states = stages.states(cohort)
    if len(states) > 1 and all(isinstance(state, Diverged) for state in states):
        stages.remove_checkpoint(cohort)  # a checkpoint of diverged parameters must not be resumed
        raise next(state for state in states if isinstance(state, Diverged))
    made = _saved(stages, cohort.items, [StateUpdate.of("begin", state) for state in states])
    if stages.session:
        stages.remove_checkpoint(cohort)  # only now: a run killed earlier resumes from the checkpoint
    return made


def update_cohort(stages: Stages, cohort: Cohort) -> Sequence[StateUpdate]:
    """Update the states of people whose histories have grown, and save them if there is a store."""
    if (session := stages.session) is None:
        return update_states(stages, cohort)
    forgotten = session.forgotten([item.person.id for item in cohort.items])
    loaded = [
        forgotten_meanwhile() if item.person.id in forgotten else _earlier(session.store, item) for item in cohort.items
    ]
    items = [replace(item, earlier=state) for item, state in zip(cohort.items, loaded) if isinstance(state, State)]
    made = iter(update_states(stages, replace(cohort, items=tuple(items))) if items else [])
    updates = [next(made) if isinstance(one, State) else StateUpdate("keep", error=one) for one in loaded]
    return _saved(stages, cohort.items, updates)


def _earlier(store: Store, item: WorkItem) -> State | NotSaved:
    """Load the whole state that an update starts from; return why not if that version is another state, or damaged."""
    try:
        state = store.load(item.person.id, item.version)
    except (PersonNotFound, StateCorrupt) as error:
        return error
    return overtaken(item.person.id) if item.earlier is None or state.work != item.earlier.work else state


def _saved(stages: Stages, items: Sequence[WorkItem], made: Sequence[StateUpdate]) -> list[StateUpdate]:
    """Save all new states, if there is a store; a bucket takes several at once, as each has to wait for its answers.

    The updates are returned without their states, or with the error of saving: another process saved a newer version,
    or the person was forgotten.
    """
    if (session := stages.session) is None:
        return list(made)

    def save(pair: tuple[WorkItem, StateUpdate]) -> StateUpdate:
        item, update = pair
        if update.state is None:
            return update
        try:
            session.save(item.person.id, update.state, after=item.version)
        except (PersonForgotten, StoreConflict) as error:
            return replace(update, state=None, error=error)
        return replace(update, state=None)

    return list(session.store.files.each(save, list(zip(items, made))))
