"""Coefficient policies: how much of each retrieved anchor goes into a person's merge. A function for each.

To add one: write it below under ``@policy``, name it in ``config.Policy`` (its settings go into ``MergeSettings``), and
test it against its formula. docs/how-to/add-a-policy.md walks through one. All of them are our choice but ``uniform``
and ``similarity``, which a linear merge of the nearest anchors suggests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mta.config import MergeSettings
from mta.errors import ConfigError
from mta.personalize.likelihoods import Evidence, Labels


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What a policy may look at, of U people and the K anchors retrieved for each, nearest first: their shots alone.

    Shapes: ids (U, K), anchor numbers; similarity (U, K), cosine of person and anchor, float64. ``before`` (U, K) are
    the coefficients of a person whose history has grown, exact to ``rounding``, ``seen`` (U,) the target tokens these
    were made of; the evidence is then that of the new items alone.
    """

    ids: Tensor
    similarity: Tensor
    evidence: Evidence | None = None
    before: Tensor | None = None
    seen: Tensor | None = None
    rounding: float = 0.0

    @property
    def scored(self) -> Evidence:
        """The evidence, for policies that say they read it. Raises ConfigError where none was gathered."""
        if self.evidence is None:
            raise ConfigError(
                "this policy needs the anchors' likelihood of the shots",
                hint="Gather it with mta.personalize.likelihoods.gather_evidence, or use merge.policy=similarity.",
            )
        return self.evidence

    @property
    def loglik(self) -> Tensor:
        """(U, K): log-likelihood of all shots of a person under each retrieved anchor."""
        return self.scored.anchors.gather(1, self.ids)


Weigh = Callable[[MergeSettings, Retrieved], Tensor]


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy and what it needs to be told before anything is scored."""

    weigh: Weigh  # -> w (U, K), float64
    evidence: Callable[[MergeSettings], bool]  # whether it reads the anchors' losses, or the encodings alone
    labels: bool  # whether it needs the scores of a closed set of labels
    wide: bool  # whether it is made for all anchors, rather than for a few nearest


POLICIES: dict[str, Policy] = {}


def policy(
    *, evidence: bool | Callable[[MergeSettings], bool] = False, labels: bool = False, wide: bool = False
) -> Callable[[Weigh], Weigh]:
    """Register a function under its own name. See ``Policy`` for what is said of it."""

    def register(weigh: Weigh) -> Weigh:
        reads = evidence if callable(evidence) else lambda _: evidence
        POLICIES[weigh.__name__] = Policy(weigh, reads, labels, wide)
        return weigh

    return register


@policy(wide=True)
def uniform(settings: MergeSettings, of: Retrieved) -> Tensor:
    """The same for all."""
    return torch.full_like(of.similarity, 1 / of.ids.shape[1])


@policy()
def top1(settings: MergeSettings, of: Retrieved) -> Tensor:
    """All of the nearest."""
    return torch.eye(1, of.ids.shape[1], dtype=of.similarity.dtype).expand_as(of.similarity).clone()


@policy()
def fixed(settings: MergeSettings, of: Retrieved) -> Tensor:
    """A fixed share of the nearest, the others share the rest: for Figure 3."""
    k = of.ids.shape[1]
    w = torch.full_like(of.similarity, (1 - settings.fixed) / (k - 1) if k > 1 else 0.0)
    w[:, 0] = settings.fixed
    return w


@policy()
def similarity(settings: MergeSettings, of: Retrieved) -> Tensor:
    """Softmax of the cosines."""
    return torch.softmax(of.similarity / settings.tau, dim=1)


@policy(evidence=True)
def loss(settings: MergeSettings, of: Retrieved) -> Tensor:
    """Softmax of minus each anchor's loss per token. What earlier items said counts by their tokens, exactly."""
    logits, tokens = of.loglik / settings.tau, of.scored.tokens[:, None]
    if of.before is not None and of.seen is not None:
        logits, tokens = logits + of.seen[:, None] * of.before.log(), tokens + of.seen[:, None]
    return torch.softmax(logits / tokens, dim=1)


@policy(evidence=True, wide=True)
def posterior(settings: MergeSettings, of: Retrieved) -> Tensor:
    """Probability of each anchor given the shots, with the task LoRA alone as the null anchor.

    w[u, k] in proportion to (1 - null_prior) / K * exp((loglik[u, k] - task[u]) / T), the null taking the rest: w sums
    to less than 1, and to nearly nothing when no anchor explains the shots better than the pooled model. ``loglik``
    sums over all shots, which is the design's m * mean. One posterior is the prior of the next: shots in two helpings
    say what all at once say.
    """
    if of.before is None:
        prior = torch.full_like(of.loglik, (1 - settings.null_prior) / of.ids.shape[1])
        null = torch.full_like(of.scored.task, settings.null_prior)
    else:  # what rounding leaves of a null that is as good as gone: it can come back
        prior = of.before
        null = (1 - prior.sum(1)).clamp_min(of.rounding)
    gain = (of.loglik - of.scored.task[:, None]) / settings.temperature
    return torch.softmax(torch.cat([gain + prior.log(), null[:, None].log()], dim=1), dim=1)[:, :-1]


@policy(evidence=True, labels=True, wide=True)
def ridge(settings: MergeSettings, of: Retrieved) -> Tensor:
    """The coefficients that best explain the labels of the shots, pulled to zero, or to those of ``before``."""
    if of.scored.labels is None:
        raise ConfigError("policy 'ridge' needs a task with labels", hint="Use merge.policy=posterior for free text.")
    return fit_labels(of.scored.labels, of.ids, settings.ridge, before=of.before)


@policy(evidence=lambda settings: settings.start == "posterior", wide=True)
def learned(settings: MergeSettings, of: Retrieved) -> Tensor:
    """Where the descent in the coefficients begins (``fuse.learn`` does it): the posterior, or zero."""
    return torch.zeros_like(of.similarity) if settings.start == "zero" else posterior(settings, of)


def fit_labels(
    labels: Labels, ids: Tensor, strength: float, iterations: int = 50, before: Tensor | None = None
) -> Tensor:
    """Ridge on the scores of labels: nothing is trained or run again.

    A merge's label scores are taken as linear in w, score(w) = task + sum_k w_k (anchor_k - task), which holds for
    small w. Minimises the shots' NLL over the labels + ``strength / 2 * |w|^2`` by Newton's method, in float64.
    Coefficients may be negative, and are 0 where the shots say nothing. With ``before`` (U, K) they are pulled there.
    Shapes: ids (U, K) -> (U, K).
    """
    there = (labels.gold >= 0).double()
    pooled, anchors = labels.scores[..., 0], labels.scores[..., 1:]
    index = ids[:, None, None, :].expand(*anchors.shape[:3], ids.shape[1])
    slopes = (anchors - pooled[..., None]).gather(3, index)  # (U, M, C, K)
    gold = torch.nn.functional.one_hot(labels.gold.clamp_min(0), pooled.shape[2]).double()
    pull = strength * torch.eye(ids.shape[1], dtype=torch.float64)
    centre = torch.zeros(ids.shape, dtype=torch.float64) if before is None else before
    w = centre
    for _ in range(iterations):
        p = torch.softmax(pooled + torch.einsum("umck,uk->umc", slopes, w), dim=2)
        gradient = torch.einsum("umck,umc,um->uk", slopes, p - gold, there) + strength * (w - centre)
        centred = slopes - torch.einsum("umck,umc->umk", slopes, p)[:, :, None]
        curvature = torch.einsum("umck,umc,um,umcl->ukl", centred, p, there, centred) + pull
        step = torch.linalg.solve(curvature, gradient)
        w = w - step
        if float(step.abs().max()) < 1e-12:
            break
    return w
