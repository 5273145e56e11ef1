"""Policies of other papers, and of our experiments; each needs only the shots.

``uniform`` follows from a linear merge of the nearest anchors, ``released`` is in the authors' code; all other policies
are our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mta.config import MergeSettings
from mta.errors import ConfigError
from mta.personalize.evidence import Labels
from mta.personalize.policies import PolicyInput, policy, posterior

_NEWTON_STEPS = 50  # of a ridge fit, at most


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


@policy(evidence=True, labels=True, all_anchors=True)
def ridge(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return the coefficients that best explain the shots' labels, pulled to 0 or to ``before``."""
    if known.required_evidence.labels is None:
        raise ConfigError("policy 'ridge' needs a task with labels", hint="Use merge.policy=posterior for free text.")
    return fit_labels(known.required_evidence.labels, known.ids, settings.ridge, before=known.before)


@policy(evidence=lambda settings: settings.start == "posterior", all_anchors=True, learns=True)
def learned(settings: MergeSettings, known: PolicyInput) -> Tensor:
    """Return the posterior, or 0, where the gradient descent starts."""
    return torch.zeros_like(known.similarity) if settings.start == "zero" else posterior.weigh(settings, known)


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
