"""Coefficient policies: one function per policy computes the coefficients of a person's retrieved anchors.

To add a policy, see docs/how-to/add-a-policy.md. ``uniform`` and ``similarity`` follow from a linear merge of the
nearest anchors, ``released`` is in the authors' code; all other policies are our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mta.bank.calibration.laplace import Calibration
from mta.config import MergeSettings
from mta.errors import ConfigError
from mta.personalize.evidence import Evidence, Labels
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


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy and its needs, which are checked before anything is scored."""

    weigh: Weigh  # -> w (U, K), float64
    evidence: Callable[[MergeSettings], bool]  # whether the policy reads the anchors' losses
    gradients: bool  # whether the policy reads the shots' gradients and the bank's calibration
    labels: bool  # whether the policy needs the scores of a closed set of labels
    all_anchors: bool  # whether the policy is meant for all anchors, or only for the nearest
    cosines: bool  # whether the policy reads the cosines of people and anchors
    learns: bool  # whether gradient descent on the shots goes on from the policy's coefficients (``learn`` in merge.py)

    def by_content(self, settings: MergeSettings) -> bool:
        """Return whether anchors are retrieved or weighted by content, which needs their encodings."""
        nearest = bool(settings.k) or not (self.all_anchors or self.evidence(settings))
        return self.cosines or (nearest and settings.retrieve == "cosine")


_NEWTON_STEPS = 50  # of a ridge fit, at most
POLICIES: dict[str, Policy] = {}


def policy(
    *,
    evidence: bool | Callable[[MergeSettings], bool] = False,
    gradients: bool = False,
    labels: bool = False,
    all_anchors: bool = False,
    cosines: bool = False,
    learns: bool = False,
) -> Callable[[Weigh], Weigh]:
    """Register a function as a policy under the function's name; arguments as in ``Policy``."""

    def register(weigh: Weigh) -> Weigh:
        reads = evidence if callable(evidence) else lambda _: evidence
        POLICIES[weigh.__name__] = Policy(weigh, reads, gradients, labels, all_anchors, cosines, learns)
        return weigh

    return register


def policy_of(settings: MergeSettings) -> Policy:
    """Return the policy of settings. Raises ConfigError for ``auto``, which only a bank can resolve."""
    if settings.policy == "auto":
        raise ConfigError("merge.policy=auto needs a bank", hint="Ask the bank:  bank.settled(run).merge")
    return POLICIES[settings.policy]


@policy(all_anchors=True)
def uniform(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return equal coefficients, 1 / K."""
    return torch.full_like(known.similarity, 1 / known.ids.shape[1])


@policy()
def top1(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return 1 for the nearest anchor, 0 for the others."""
    w = torch.zeros_like(known.similarity)
    w[:, 0] = 1
    return w


@policy()
def fixed(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return a fixed share for the nearest anchor; the other anchors share the rest equally. For Figure 3."""
    k = known.ids.shape[1]
    w = torch.full_like(known.similarity, (1 - settings.fixed) / (k - 1) if k > 1 else 0.0)
    w[:, 0] = settings.fixed
    return w


@policy(cosines=True)
def similarity(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return the softmax of the cosines."""
    return torch.softmax(known.similarity / settings.tau, dim=1)


@policy(cosines=True)
def released(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return the cosines' shares in reverse: of two anchors, the nearer one gets the share of the farther one.

    Negative cosines count as zero; without positive ones all shares are equal. Source: the code of arXiv:2511.20072.
    """
    cosines = known.similarity.clamp_min(0)
    cosines = torch.where(cosines.sum(1, keepdim=True) > 0, cosines, torch.ones_like(cosines))
    return (cosines / cosines.sum(1, keepdim=True)).flip(1)


@policy(evidence=True)
def loss(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return the softmax of each anchor's log-likelihood per token.

    With ``before``, the result is exactly that of all items: earlier items are weighted by their tokens.
    """
    logits, tokens = known.loglik / settings.tau, known.required_evidence.tokens[:, None]
    if known.before is not None and known.seen is not None:
        seen = known.seen[:, None]
        logits, tokens = logits + seen * known.before.log(), tokens + seen
    return torch.softmax(logits / tokens, dim=1)


@policy(evidence=True, all_anchors=True)
def posterior(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return the probability of each anchor given the shots; the null anchor is the pooled model.

    w[u, k] is proportional to (1 - null_prior) / K * exp((loglik[u, k] - pooled[u]) / T), and the null anchor takes the
    rest. So w sums to less than 1, and to almost 0 if no anchor explains the shots better than the pooled model.
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
    if known.calibration is None or known.gradients is None:
        raise ConfigError(
            "policy 'laplace' needs the shots' gradients and a calibrated bank",
            hint="Calibrate the bank (mta bank calibrate), or use merge.policy=posterior.",
        )
    sums, loglik, shots = known.gradients
    w = known.calibration.coefficients(sums, loglik, shots)
    return w.gather(1, known.ids)


@policy(evidence=True, labels=True, all_anchors=True)
def ridge(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return the coefficients that best explain the shots' labels, pulled to 0 or to ``before``."""
    if known.required_evidence.labels is None:
        raise ConfigError("policy 'ridge' needs a task with labels", hint="Use merge.policy=posterior for free text.")
    return fit_labels(known.required_evidence.labels, known.ids, settings.ridge, before=known.before)


@policy(evidence=lambda settings: settings.start == "posterior", all_anchors=True, learns=True)
def learned(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return the posterior, or 0, where the gradient descent starts."""
    return torch.zeros_like(known.similarity) if settings.start == "zero" else posterior(settings, known)


def fit_labels(labels: Labels, ids: Tensor, strength: float, before: Tensor | None = None) -> Tensor:
    """Fit coefficients to the labels' scores by ridge regression; needs no training and no forward pass.

    Label scores of a merge are taken as linear in w, score(w) = task + sum_k w_k (anchor_k - task), which holds for
    small w. Minimizes the shots' NLL over the labels + ``strength / 2 * |w - before|^2`` by Newton's method in float64;
    ``before`` (U, K) is 0 if it is not given. Coefficients may be negative; w stays at ``before`` if the shots say
    nothing about an anchor. Shapes: ids (U, K) -> (U, K).
    """
    real = (labels.gold >= 0).double()  # 0 for missing shots
    pooled, anchors = labels.scores[..., 0], labels.scores[..., 1:]
    index = ids[:, None, None, :].expand(*anchors.shape[:3], ids.shape[1])
    slopes = (anchors - pooled[..., None]).gather(3, index)  # (U, M, C, K)
    gold = torch.nn.functional.one_hot(labels.gold.clamp_min(0), pooled.shape[2]).double()
    pull = strength * torch.eye(ids.shape[1], dtype=torch.float64)
    center = torch.zeros(ids.shape, dtype=torch.float64) if before is None else before

    def objective(w: Tensor) -> Tensor:
        scores = torch.log_softmax(pooled + torch.einsum("umck,uk->umc", slopes, w), dim=2)
        return strength / 2 * (w - center).square().sum(1) - torch.einsum("umc,umc,um->u", scores, gold, real)

    w = center
    for _ in range(_NEWTON_STEPS):
        p = torch.softmax(pooled + torch.einsum("umck,uk->umc", slopes, w), dim=2)
        gradient = torch.einsum("umck,umc,um->uk", slopes, p - gold, real) + strength * (w - center)
        centered = slopes - torch.einsum("umck,umc->umk", slopes, p)[:, :, None]
        curvature = torch.einsum("umck,umc,um,umcl->ukl", centered, p, real, centered) + pull
        step = torch.linalg.solve(curvature, gradient)
        most = objective(w) + 1e-12  # rounding is no reason for a smaller step
        for _ in range(50):  # a full step overshoots where labels are almost certain, and wrong
            if not bool((worse := objective(w - step) > most).any()):
                break
            step = torch.where(worse[:, None], step / 2, step)
        w = w - step
        if float(step.abs().max()) < 1e-12:
            break
    return w
