"""Separate members from others by a score: AUC, TPR at 1% FPR, and their intervals by resampling people.

Input and output are plain arrays, without a model. An item is one trial under one model. Two trials are compared only
if both are under the same model, because an attacker has one model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mta.evaluation.statistics import Interval

Numbers = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]
Truths = npt.NDArray[np.bool_]
FPR = 0.01
TIMES = 1000  # resamples
_ROUNDING = 1e-9  # tolerance in comparisons of shares


@dataclass(frozen=True, slots=True)
class Trials:
    """Items under models. Shapes: all (n,).

    ``model`` is the number of the model. ``person`` is the number of the item's person, -1 if the model belongs to the
    same person. ``member`` says whether the model, or one of its anchors, was trained on the item.
    """

    model: Places
    person: Places
    member: Truths


@dataclass(frozen=True, slots=True)
class Attack:
    """How well members are separated from others; guessing gives AUC 0.5, and TPR 0.01 at 1% FPR."""

    auc: Interval
    tpr: Interval


def attack(trials: Trials, scores: Numbers, seed: int = 0, times: int = TIMES) -> Attack:
    """Return AUC and TPR with 95% intervals; ``scores`` (n,) are higher for likely members.

    The AUC is the mean over models, weighted by the pairs of a member and a non-member. The TPR uses one threshold for
    all models, because 1% of the few dozen others of one model is less than one item. For the intervals, members'
    people, others' people and models are drawn with replacement, independently. An item of the model's own person is
    drawn with the model. Source: our choice.
    """
    once, drawn = np.ones((1, len(scores))), _weights(trials, np.random.default_rng(seed), times)
    aucs, tprs = resampled_auc(trials, scores, *drawn), resampled_tpr(trials, scores, *drawn)
    return Attack(
        _interval(float(resampled_auc(trials, scores, once, once)[0]), aucs),
        _interval(float(resampled_tpr(trials, scores, once, once)[0]), tprs),
    )


def resampled_auc(trials: Trials, scores: Numbers, models: Numbers, people: Numbers) -> Numbers:
    """Return the probability that a member scores higher than another item under the same model; ties count half.

    ``models`` are weights of each trial's model, ``people`` of its person. A pair has the weight of its model once.
    Shapes: models, people (times, n) -> (times,).
    """
    above, pairs = np.zeros(len(models)), np.zeros(len(models))
    for model in np.unique(trials.model):
        mine = trials.model == model
        a, b = np.flatnonzero(mine & trials.member), np.flatnonzero(mine & ~trials.member)
        if not len(a) or not len(b):
            continue
        won = 0.5 * ((scores[a, None] > scores[None, b]) + 1.0 * (scores[a, None] >= scores[None, b]))
        drawn = models[:, a[0]]
        above += drawn * ((people[:, a] @ won) * people[:, b]).sum(1)
        pairs += drawn * people[:, a].sum(1) * people[:, b].sum(1)
    return _ratio(above, pairs)


def resampled_tpr(trials: Trials, scores: Numbers, models: Numbers, people: Numbers, fpr: float = FPR) -> Numbers:
    """Return the largest share of members above a threshold that at most a share ``fpr`` of the others exceeds.

    Weights and shapes as in ``resampled_auc``. Source: Carlini et al., arXiv:2112.03570, who report low false positive
    rates beside the AUC.
    """
    weights = models * people
    a, b = np.flatnonzero(trials.member), np.flatnonzero(~trials.member)
    a, b = a[np.argsort(-scores[a], kind="stable")], b[np.argsort(-scores[b], kind="stable")]
    passed = weights[:, b].cumsum(1)
    # A threshold must be above the score of the first non-member that exceeds the allowed share.
    barrier = scores[b][(passed > (fpr + _ROUNDING) * passed[:, -1:]).argmax(1)]
    caught = np.searchsorted(-scores[a], -barrier, side="left")  # members strictly above it
    whole = np.concatenate([np.zeros((len(weights), 1)), weights[:, a].cumsum(1)], 1)
    return _ratio(whole[np.arange(len(whole)), caught], whole[:, -1] * (passed[:, -1] > 0))


def _weights(trials: Trials, chance: np.random.Generator, times: int) -> tuple[Numbers, Numbers]:
    """Return how often each trial's model and person are drawn: two arrays (times, n)."""
    people = np.ones((times, len(trials.model)))
    for member in (True, False):
        mine = (trials.member == member) & (trials.person >= 0)
        people[:, mine] = _drawn(trials.person[mine], chance, times)
    return _drawn(trials.model, chance, times), people


def _drawn(units: Places, chance: np.random.Generator, times: int) -> Numbers:
    """Draw units with replacement, as many as there are; return how often each entry's unit is drawn, (times, n)."""
    known, place = np.unique(units, return_inverse=True)
    if not len(known):
        return np.ones((times, 0))
    return chance.multinomial(len(known), np.full(len(known), 1 / len(known)), size=times)[:, place].astype(np.float64)


def _ratio(part: Numbers, whole: Numbers) -> Numbers:
    """Divide; resamples without pairs give NaN, which intervals ignore."""
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def _interval(mean: float, resamples: Numbers) -> Interval:
    low, high = np.nanquantile(resamples, [0.025, 0.975])
    return Interval(mean, float(low), float(high))
