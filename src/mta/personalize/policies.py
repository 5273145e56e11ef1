"""Coefficient policies: one function per policy computes the coefficients of a person's retrieved anchors.

``similarity`` follows from the paper's linear merge of the nearest anchors; the others are our choice. Policies of
other packages are found by the entry points of the group ``mta.policies``: docs/how-to/add-a-policy.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mta.bank.calibration.laplace import Calibration
from mta.config import MergeSettings, Settings, Training, plugins
from mta.config.schema import POLICY_GROUP
from mta.errors import ConfigError
from mta.personalize.evidence import Evidence
from mta.personalize.shots import ShotGradients


@dataclass(frozen=True, slots=True)
class PolicyInput:
    """The input of a policy: U people and the K anchors retrieved for each, nearest first. Everything is from shots.

    Shapes: ids (U, K), anchor numbers; similarity (U, K), cosine of person and anchor, float64. For people whose
    histories have grown, ``before`` (U, K) are the coefficients of their earlier items, exact to ``rounding``, and
    ``seen`` (U,) is the number of target tokens of those items; ``evidence`` then covers only the new items.
    ``gradients`` cover all items, earlier ones too; they are taken at the mu of ``calibration``.
    """

    ids: Tensor
    similarity: Tensor
    evidence: Evidence | None = None
    before: Tensor | None = None
    seen: Tensor | None = None
    rounding: float = 0.0
    gradients: ShotGradients | None = None
    calibration: Calibration | None = None

    @property
    def required_evidence(self) -> Evidence:
        """The evidence, for policies that read it. Raises ConfigError if none was gathered."""
        if self.evidence is None:
            raise ConfigError(
                "this policy needs the anchors' likelihood of the shots",
                hint="Gather it with mta.personalize.evidence.gather_evidence, or use merge.policy=similarity.",
            )
        return self.evidence

    @property
    def loglik(self) -> Tensor:
        """(U, K): log-likelihood of all shots of a person under each retrieved anchor."""
        return self.required_evidence.anchor_loglik.gather(1, self.ids)


Weigh = Callable[[MergeSettings, PolicyInput], Tensor]
Learns = Callable[[MergeSettings], Training]


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy and its needs, which are checked before anything is scored."""

    weigh: Weigh  # -> w (U, K), float64
    evidence: bool | Callable[[MergeSettings], bool] = False  # whether the policy reads the anchors' losses
    gradients: bool = False  # whether the policy reads the shots' gradients and the bank's calibration
    labels: bool = False  # whether the policy needs the scores of a closed set of labels
    all_anchors: bool = False  # whether the policy is meant for all anchors, or only for the nearest
    cosines: bool = False  # whether the policy reads the cosines of people and anchors
    learns: Learns | None = None  # the training that goes on from the policy's coefficients (``learn`` in merge.py)
    options: type[Settings] | None = None  # the class of ``merge.options``; None: the policy has no options

    def reads_evidence(self, settings: MergeSettings) -> bool:
        """Return whether the policy with these settings reads the anchors' losses."""
        return self.evidence(settings) if callable(self.evidence) else self.evidence


def policy(**needs: Any) -> Callable[[Weigh], Policy]:
    """Make a policy of a function; arguments as in ``Policy``."""
    return partial(Policy, **needs)


def policy_named(name: str) -> Policy:
    """Return a policy by its name in settings, which are checked to name one."""
    policy: Policy = POLICIES.get(name) or plugins.load(POLICY_GROUP, name)
    return policy


def policy_of(settings: MergeSettings) -> Policy:
    """Return the policy of settings. Raises ConfigError for ``auto``, which only a bank can resolve."""
    if settings.policy == "auto":
        raise ConfigError(
            "merge.policy=auto needs a bank", hint="Ask the bank:  bank.with_calibrated_settings(run).merge"
        )
    return policy_named(settings.policy)


@policy(cosines=True)
def similarity(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return the softmax of the cosines."""
    return torch.softmax(known.similarity / settings.tau, dim=1)


@policy(evidence=True, all_anchors=True)
def posterior(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return the probability of each anchor given the shots; the null anchor is the pooled model.

    w[u, k] is proportional to (1 - null_prior) / K * exp((loglik[u, k] - pooled[u]) / T), and the null anchor takes the
    rest. So w sums to less than 1, and to almost 0 if every anchor is far worse than the pooled model.
    ``loglik`` sums over all shots. With ``before``, the earlier posterior is the prior, so the result is that of all
    items, as far as float32 can tell the earlier null anchor from 0 (``is_saturated``).
    """
    if known.before is None:
        prior = torch.full_like(known.loglik, (1 - settings.null_prior) / known.ids.shape[1])
        null = torch.full_like(known.required_evidence.pooled_loglik, settings.null_prior)
    else:  # the null is never exactly 0 after rounding, so that new items can raise it again
        prior = known.before
        null = (1 - prior.sum(1)).clamp_min(known.rounding)
    gain = (known.loglik - known.required_evidence.pooled_loglik[:, None]) / settings.temperature
    return torch.softmax(torch.cat([gain + prior.log(), null[:, None].log()], dim=1), dim=1)[:, :-1]


def is_saturated(settings: MergeSettings, w: Sequence[float]) -> bool:
    """Return whether coefficients in float32 are of a posterior that is 0 or 1 somewhere, so that evidence is lost."""
    return settings.policy == "posterior" and (min(w) <= 0 or sum(w) / settings.scale >= 1 - 1e-6)


@policy(gradients=True, all_anchors=True)
def laplace(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return the best coefficients of a quadratic model of the log-likelihood, from one gradient (``Calibration``).

    The gradient is a sum over shots, so the result for a longer history is exactly that of all its items.
    """
    assert known.calibration  # ``check_merge`` has checked it
    assert known.gradients
    sums, loglik, shots = known.gradients
    w = known.calibration.coefficients(sums, loglik, shots)
    return w.gather(1, known.ids)


@policy(all_anchors=True)
def none(_: MergeSettings, known: PolicyInput) -> Tensor:
    """Return zeros: no merge. A stack is then a LoRA over the pooled model ("rank 1 alone")."""
    return torch.zeros_like(known.similarity)


POLICIES = {"laplace": laplace, "none": none, "posterior": posterior, "similarity": similarity}
