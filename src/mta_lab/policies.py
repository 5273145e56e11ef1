"""Policies of other papers, and of our experiments; each needs only the shots.

``uniform`` follows from a linear merge of the nearest anchors, ``released`` is in the authors' code; all other policies
are our choice.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mta.config import MergeSettings, Settings, Training
from mta.errors import ConfigError
from mta.personalize.evidence import Labels
from mta.personalize.policies import PolicyInput, policy, posterior

_NEWTON_STEPS = 50  # of a ridge fit, at most


class ByLoss(Settings):
    """Options of ``uniform`` and ``loss``."""

    by_loss: int = Field(default=0, ge=0, description="merge only so many anchors, with the least loss on the shots")
    tau: float = Field(default=0.2, gt=0, description="temperature of the loss policy")


class Fixed(Settings):
    """Options of ``fixed``."""

    share: float = Field(default=0.5, ge=0, le=1, description="share of the nearest anchor")


class Ridge(Settings):
    """Options of ``ridge``."""

    strength: float = Field(default=300.0, gt=0, description="strength of the pull to zero")


class Learned(Settings):
    """Options of ``learned``. The descent starts at the posterior, or at zero, which needs no pass per anchor.

    A large eps makes AdamW plain gradient descent: a coefficient with a small gradient moves little. weight_decay pulls
    the coefficients back to their start.
    """

    start: Literal["posterior", "zero"] = "posterior"
    training: Training = Training(lr=0.05, steps=1, batch_size=64, eps=1.0, clip=1e9)


def _nearest_by_loss(count: int, known: PolicyInput) -> Tensor:
    """Return which anchors a merge keeps, (U, K): all without ``count``, or those with the least loss."""
    keep = torch.ones_like(known.ids, dtype=torch.bool)
    if count:
        ids = known.loglik.argsort(dim=1, descending=True, stable=True)[:, :count]
        keep = torch.zeros_like(keep).scatter(1, ids, True)
    return keep


@policy(
    evidence=lambda settings: bool(ByLoss.model_validate(settings.options).by_loss), all_anchors=True, options=ByLoss
)
def uniform(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return equal coefficients, 1 / K."""
    if known.before is not None:  # the anchors stay
        return known.before
    keep = _nearest_by_loss(ByLoss.model_validate(settings.options).by_loss, known).double()
    return keep / keep.sum(1, keepdim=True)


@policy()
def top1(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return 1 for the nearest anchor, 0 for the others."""
    w = torch.zeros_like(known.similarity)
    w[:, 0] = 1
    return w


@policy(options=Fixed)
def fixed(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return a fixed share for the nearest anchor; the other anchors share the rest equally. For Figure 3."""
    k, share = known.ids.shape[1], Fixed.model_validate(settings.options).share
    w = torch.full_like(known.similarity, (1 - share) / (k - 1) if k > 1 else 0.0)
    w[:, 0] = share
    return w


@policy(cosines=True)
def released(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return the cosines' shares in reverse: of two anchors, the nearer one gets the share of the farther one.

    Negative cosines count as zero; without positive ones all shares are equal. Source: the code of arXiv:2511.20072.
    """
    cosines = known.similarity.clamp_min(0)
    cosines = torch.where(cosines.sum(1, keepdim=True) > 0, cosines, torch.ones_like(cosines))
    return (cosines / cosines.sum(1, keepdim=True)).flip(1)


@policy(evidence=True, options=ByLoss)
def loss(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return the softmax of each anchor's log-likelihood per token.

    With ``before``, the result is exactly that of all items: earlier items are weighted by their tokens.
    """
    options = ByLoss.model_validate(settings.options)
    logits, tokens = known.loglik / options.tau, known.required_evidence.tokens[:, None]
    if known.before is not None and known.seen is not None:
        seen = known.seen[:, None]
        logits, tokens = logits + seen * known.before.log(), tokens + seen
    elif options.by_loss:
        logits = logits.masked_fill(~_nearest_by_loss(options.by_loss, known), -torch.inf)
    return torch.softmax(logits / tokens, dim=1)


@policy(evidence=True, labels=True, all_anchors=True, options=Ridge)
def ridge(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return the coefficients that best explain the shots' labels, pulled to 0 or to ``before``."""
    if known.required_evidence.labels is None:
        raise ConfigError("policy 'ridge' needs a task with labels", hint="Use merge.policy=posterior for free text.")
    strength = Ridge.model_validate(settings.options).strength
    return fit_labels(known.required_evidence.labels, known.ids, strength, before=known.before)


@policy(
    evidence=lambda settings: Learned.model_validate(settings.options).start == "posterior",
    all_anchors=True,
    learns=lambda settings: Learned.model_validate(settings.options).training,
    options=Learned,
)
def learned(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return the posterior, or 0, where the gradient descent starts."""
    if Learned.model_validate(settings.options).start == "zero":
        return torch.zeros_like(known.similarity)
    return posterior.weigh(settings, known)


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
