"""When a history grows: what its new items say of the state there is, and a state made from that one at their cost.

The new items are scored before anything is trained on them, so their loss is honest evidence of how the state does:

    keep      it explains them as well as the shots it was made of, and no part of it stands in the way
    retrain   the merge still helps, and there is something to learn: the stack is trained on from where it was
    refresh   the merge is worse than none: its coefficients are fitted on from where they were, then the stack

Source: our choice; docs/decisions/015 has what it was measured against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mta.config import MergeSettings
from mta.errors import Diverged, PersonForgotten
from mta.lora.batch import LoraBatch, stack
from mta.model.encoders import encode_people
from mta.personalize.adapters import merge_of
from mta.personalize.likelihoods import Evidence, gather_evidence
from mta.personalize.merge import Merge, coefficients, learn, needs_evidence
from mta.personalize.pipeline import Cohort, Stages
from mta.personalize.policies import POLICIES, Retrieved
from mta.store.state import Losses, State
from mta.training.trainer import Job

Action = Literal["keep", "retrain", "refresh"]
MARGIN = 0.02  # nats per token: less than this is not called a difference


@dataclass(frozen=True, slots=True)
class Renewed:
    """What was decided for somebody, from which ``losses`` on their new items, and the state it led to, if another."""

    action: Action
    losses: Losses
    state: State | Diverged | PersonForgotten | None


def decide(before: Losses, new: Losses) -> Action:
    """What to do about a state whose person has new items: ``before`` are its losses on its own shots."""
    stacked = new.merged if new.stacked is None else new.stacked
    learned = before.merged if before.stacked is None else before.stacked
    if new.merged > new.pooled + MARGIN:
        return "refresh"
    if stacked <= min(learned, new.merged) + MARGIN:
        return "keep"
    return "refresh" if new.stacked is None else "retrain"


def renewed(stages: Stages, cohort: Cohort, always: Action | None = None) -> list[Renewed]:
    """Decide for everybody in a cohort of people who have a state (``Wanted.before``), and do it.

    ``always`` does the same for all of them, whatever the losses say.
    """
    jobs, befores = stages.jobs(cohort), _befores(cohort)
    told = stages.losses(jobs, merge_of(stages.base, befores), _stacks(stages, befores), cohort.tokens_per_batch)
    new = [Losses(*its) for its in told]
    actions = [always or (decide(its.losses, told) if its.losses else "refresh") for its, told in zip(befores, new)]
    states: list[State | Diverged | None] = [None] * len(cohort)
    for action in ("retrain", "refresh"):
        chosen = [i for i, its in enumerate(actions) if its == action]
        if chosen:
            some = replace(cohort, wanted=tuple(cohort.wanted[i] for i in chosen))
            pooled = [new[i].pooled for i in chosen]
            for i, state in zip(chosen, _made(stages, some, [jobs[i] for i in chosen], action, pooled)):
                states[i] = state
    return [Renewed(*found) for found in zip(actions, new, states)]


def _made(
    stages: Stages, cohort: Cohort, jobs: Sequence[Job], action: Action, pooled: Sequence[float]
) -> list[State | Diverged]:
    """New states from those before: coefficients, if they are refreshed, then stacks, from the new items alone."""
    befores = _befores(cohort)
    merge = merge_of(stages.base, befores)
    if action == "refresh":
        merge = _refreshed(stages, cohort, jobs, merge)
    stacks = stages.stacks(cohort, jobs, merge, _stacks(stages, befores))
    return stages.as_states(cohort, jobs, merge, stacks, pooled)


def _refreshed(stages: Stages, cohort: Cohort, jobs: Sequence[Job], before: Merge) -> Merge:
    """Stage 2 again, from coefficients that hold what the earlier items said, at the cost of the new ones (``jobs``).

    The posterior takes them for its prior and the loss policy weighs them by their tokens, both exactly what all items
    at once give; ridge and learned begin from them and are pulled to them. Policies of encodings alone read all items.
    """
    settings, base, bank = stages.run.merge, stages.base, stages.bank
    if settings.policy == "learned":
        return learn(
            base,
            jobs,
            bank.working,
            bank.pooled,
            before,
            settings.learned,
            seed=stages.run.seed,
            tokens_per_batch=cohort.tokens_per_batch,
            on_step=partial(stages.on_step, "coefficients") if stages.on_step else None,
        )
    if not needs_evidence(settings):
        people = [wanted.person for wanted in cohort.wanted]
        vectors = encode_people(stages.encoder, bank.task, people, bank.info.run.bank.encode)
        found = coefficients(settings, bank.similarity(vectors))
        return Merge(found.ids, found.w.to(base.master_dtype))
    how = {"tokens_per_batch": cohort.tokens_per_batch}
    evidence = gather_evidence(base, jobs, bank.working, bank.pooled, on_step=stages.on_step, **how)
    tokens = torch.tensor([float(its.losses.tokens) if its.losses else 0.0 for its in _befores(cohort)])
    w = carried_on(settings, before, evidence, tokens.double())
    return Merge(before.ids, w.to(base.master_dtype))


def carried_on(settings: MergeSettings, before: Merge, evidence: Evidence, tokens: Tensor) -> Tensor:
    """The coefficients of all items, from those of the earlier ones (of ``tokens`` targets) and evidence of the new.

    Shapes: before (U, K), tokens (U,) -> (U, K).
    """
    policy = POLICIES[settings.policy]
    if not policy.evidence(settings):  # retrieved by loss, then weighed alike: as they were
        return before.w.double()
    near = torch.zeros_like(before.w, dtype=torch.float64)  # policies of evidence look at no encodings
    earlier, rounding = before.w.double() / settings.scale, torch.finfo(before.w.dtype).eps
    of = Retrieved(before.ids, near, evidence, earlier, tokens, rounding)
    return settings.scale * policy.weigh(settings, of)


def _befores(cohort: Cohort) -> list[State]:
    return [wanted.before for wanted in cohort.wanted if wanted.before]


def _stacks(stages: Stages, befores: Sequence[State]) -> LoraBatch | None:
    """Everybody's stack; None where states have none."""
    stacks = [state.stack for state in befores if state.stack]
    return stack(stacks).to(stages.base.device) if stacks else None
