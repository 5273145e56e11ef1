"""Update the states of people whose histories have grown, at the cost of their new items.

The new items are scored before anything is trained on them, so their loss is honest evidence of the state's quality:

    keep      the state explains the new items as well as the shots it was made of, and neither merge nor stack harms
    retrain   the merge still helps, and there is something to learn: train the stack on from where it was
    refresh   the merge is worse than none: fit its coefficients on from where they were, then train the stack

A state that holds the sum of its shots' gradients gets new coefficients in any case, from the sum over all items: it is
refreshed instead of retrained, and instead of "keep" there is

    merge     solve the coefficients again, and keep the stack

Policies that read the anchors' losses, or learn, refresh instead of retraining, too: otherwise the items of a
retraining would be missing from their coefficients. So "retrain" is for policies that do neither.

Source: our choice; docs/decisions/015 has the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from mta.config.constants import NOTICEABLE
from mta.errors import Diverged, PersonForgotten, PersonNotFound, StateCorrupt, StoreConflict
from mta.lora.batch import LoraBatch, concatenate
from mta.personalize.merge import Earlier
from mta.personalize.policies import policy_of
from mta.personalize.shots import ShotsJob
from mta.personalize.stages import Stages
from mta.personalize.work import Cohort
from mta.store.state import Losses, State

Action = Literal["begin", "keep", "merge", "retrain", "refresh"]
NotSaved = Diverged | PersonForgotten | PersonNotFound | StateCorrupt | StoreConflict


@dataclass(frozen=True, slots=True)
class StateUpdate:
    """The action for one person, and a new ``state`` that is in no store yet; or why there is none.

    ``action`` is "keep", too, for people who could not be scored or saved.
    """

    action: Action
    state: State | None = None
    error: NotSaved | None = None

    @classmethod
    def of(cls, action: Action, made: State | NotSaved) -> StateUpdate:
        """Return the update with a new state, or with the error that came instead of it."""
        return cls(action, made) if isinstance(made, State) else cls(action, error=made)


def decide(before: Losses, new: Losses) -> Action:
    """Choose the action for a person with new items; ``before`` are the losses of their state on its own shots."""
    if new.merged is None or new.merged > new.pooled + NOTICEABLE:
        return "refresh"
    stacked = new.merged if new.stacked is None else new.stacked
    learned = before.merged if before.stacked is None else before.stacked
    if learned is not None and stacked <= min(learned, new.merged) + NOTICEABLE:
        return "keep"
    return "refresh" if new.stacked is None else "retrain"


def update_states(stages: Stages, cohort: Cohort) -> list[StateUpdate]:
    """Choose and perform the action for each person of a cohort; each has a state (``WorkItem.earlier``)."""
    jobs, states = stages.jobs(cohort), cohort.earlier_states
    if policy_of(stages.run.merge).gradients and not stages.run.stack.enabled:  # coefficients alone: nothing to choose
        return [StateUpdate.of("merge", state) for state in _new_states(stages, cohort, jobs, "merge")]
    # The old stacks are bound to no variable: they are freed before the new ones are trained.
    measured = stages.losses(
        jobs, stages.with_merge(stages.earlier_merge(cohort), _stacks(stages, cohort)), cohort.tokens_per_batch
    )
    policy = policy_of(stages.run.merge)
    fitted = policy.reads_evidence(stages.run.merge) or policy.learns is not None
    updates = [_decided(state, losses, fitted) for state, losses in zip(states, measured)]
    actions = [update.action for update in updates]
    for action in ("merge", "retrain", "refresh"):
        if chosen := [i for i, one in enumerate(actions) if one == action]:
            part = replace(cohort, items=tuple(cohort.items[i] for i in chosen))
            pooled = [losses.pooled for i in chosen if isinstance(losses := measured[i], Losses)]
            new_states = _new_states(stages, part, [jobs[i] for i in chosen], action, pooled)
            for i, state in zip(chosen, new_states):
                updates[i] = StateUpdate.of(action, state)
    return updates


def _decided(before: State, new: Losses | Diverged, fitted: bool) -> StateUpdate:
    """Return the action for a person from the losses on their new items; without a new state yet.

    Where coefficients are ``fitted`` to items, those that skipped items would not be those of the whole history.
    """
    if isinstance(new, Diverged):
        return StateUpdate("keep", error=new)
    action = decide(before.losses, new) if before.losses else "refresh"
    if before.gradient:
        action = "merge" if action == "keep" else "refresh"
    elif fitted and action == "retrain":
        action = "refresh"
    return StateUpdate(action)


def _new_states(
    stages: Stages, cohort: Cohort, jobs: Sequence[ShotsJob], action: Action, pooled: Sequence[float] | None = None
) -> list[State | Diverged]:
    """Make new states from the earlier ones and ``jobs``, which hold the new items only."""
    earlier, stacks = stages.earlier_merge(cohort), _stacks(stages, cohort)
    if action == "retrain":
        fitted = stages.with_merge(earlier, stacks)
    else:
        tokens = [float(state.losses.tokens) if state.losses else 0.0 for state in cohort.earlier_states]
        fitted = replace(stages.merge(cohort, jobs, Earlier(earlier, torch.tensor(tokens).double())), stacks=stacks)
    kept = replace(fitted, stacks_kept=stacks is not None)
    fitted = kept if action == "merge" else stages.stack(cohort, jobs, fitted)
    return stages.as_states(cohort, jobs, replace(fitted, pooled_losses=pooled))


def _stacks(stages: Stages, cohort: Cohort) -> LoraBatch | None:
    """Return the stacks that an update starts from; None if there are none. Files give their layers in any order."""
    stacks = [state.stack for state in cohort.earlier_states if state.stack]
    return concatenate(stacks).in_order(stages.base.targets).to(stages.base.device) if stacks else None
