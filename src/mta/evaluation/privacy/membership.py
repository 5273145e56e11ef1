"""Telling members from others by a score: AUC, TPR at 1% FPR, and their intervals by resampling people.

Plain arrays in, numbers out; nothing here knows a model. An item is one trial under one model. Two trials are compared
only where both are under the same model: whoever attacks has one model before them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mta.evaluation.statistics import Interval
from mta.system.extras import require

Numbers = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]
Truths = npt.NDArray[np.bool_]
FPR = 0.01
TIMES = 1000  # resamples
_EXACT = 1e-9  # shares of counts are compared up to rounding


@dataclass(frozen=True, slots=True)
class Trials:
    """Items put to models. Shapes: all (n,).

    ``model`` numbers the model, ``person`` whose item it is (-1: of the person that the model itself is of), ``member``
    whether the model, or what it was made of, was trained on it.
    """

    model: Places
    person: Places
    member: Truths


@dataclass(frozen=True, slots=True)
class Attack:
    """How well members are told from others; .5 is guessing for the AUC, .01 for the TPR at 1% FPR."""

    auc: Interval
    tpr: Interval


def auc(member: Truths, scores: Numbers) -> float:
    """The chance that a member scores higher than somebody else, ties counted half. Shapes: (n,)."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(member, scores))


def tpr_at(member: Truths, scores: Numbers, fpr: float = FPR) -> float:
    """The largest share of members above a threshold that at most a share ``fpr`` of the others is above.

    Shapes: (n,). Source: Carlini et al., arXiv:2112.03570, who ask for low false positive rates beside the AUC.
    """
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(member, scores, drop_intermediate=False)
    return float(true[false <= fpr + _EXACT].max())


def attack(trials: Trials, scores: Numbers, seed: int = 0, times: int = TIMES) -> Attack:
    """AUC and TPR with 95% intervals; ``scores`` (n,), higher for what is taken for a member.

    The AUC is the mean over models, each weighed by its pairs of a member and another; a model with only one of the two
    counts for nothing there. The TPR is that of one threshold for all models: 1% of one model's few dozen others would
    be no item. For the intervals members' people, others' people and models are drawn with replacement,
    apart from each other; an item of the model's own person comes and goes with the model. Source: our choice.
    """
    models = np.unique(trials.model)
    kinds = [(mine & trials.member, mine & ~trials.member) for mine in (trials.model == model for model in models)]
    both = [(int(a.sum()) * int(b.sum()), a | b) for a, b in kinds]
    means = [(pairs, auc(trials.member[mine], scores[mine])) for pairs, mine in both if pairs]
    mean = sum(pairs * value for pairs, value in means) / sum(pairs for pairs, _ in means)
    weights = _weights(trials, np.random.default_rng(seed), times)
    return Attack(
        _interval(mean, resampled_auc(trials, scores, *weights)),
        _interval(tpr_at(trials.member, scores), resampled_tpr(trials, scores, *weights)),
    )


def resampled_auc(trials: Trials, scores: Numbers, models: Numbers, people: Numbers) -> Numbers:
    """The AUC of ``attack``, with weights. Shapes: models, people (times, n) -> (times,).

    ``models`` weighs a trial's model and ``people`` its person: a pair counts the one model it is under once.
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
    """``tpr_at`` with weights. Shapes: models, people (times, n) -> (times,)."""
    weights = models * people
    a, b = np.flatnonzero(trials.member), np.flatnonzero(~trials.member)
    a, b = a[np.argsort(-scores[a], kind="stable")], b[np.argsort(-scores[b], kind="stable")]
    passed = weights[:, b].cumsum(1)
    # The first of the others who would be one too many: a threshold must lie above their score.
    barrier = scores[b][(passed > (fpr + _EXACT) * passed[:, -1:]).argmax(1)]
    caught = np.searchsorted(-scores[a], -barrier, side="left")  # members strictly above it
    whole = np.concatenate([np.zeros((len(weights), 1)), weights[:, a].cumsum(1)], 1)
    return _ratio(whole[np.arange(len(whole)), caught], whole[:, -1] * (passed[:, -1] > 0))


def rank_correlation(unit: Places, x: Numbers, y: Numbers, seed: int = 0, times: int = TIMES) -> Interval | None:
    """Spearman's correlation of x and y with its 95% interval, whole units drawn with replacement. Shapes: (n,).

    None where x or y is the same everywhere.
    """
    require("eval", "scipy")
    from scipy.stats import rankdata

    def spearman(places: Places) -> float:
        ranks = np.stack([rankdata(x[places]), rankdata(y[places])])
        return float(np.corrcoef(ranks)[0, 1]) if (ranks.std(1) > 0).all() else float("nan")

    mean = spearman(np.arange(len(x)))
    if np.isnan(mean):
        return None
    chance, groups = np.random.default_rng(seed), [np.flatnonzero(unit == one) for one in np.unique(unit)]
    draws = chance.integers(len(groups), size=(times, len(groups)))
    return _interval(mean, np.array([spearman(np.concatenate([groups[g] for g in drawn])) for drawn in draws]))


def _weights(trials: Trials, chance: np.random.Generator, times: int) -> tuple[Numbers, Numbers]:
    """How often each trial's model, and its person, is drawn: two of (times, n)."""
    people = np.ones((times, len(trials.model)))
    for member in (True, False):
        mine = (trials.member == member) & (trials.person >= 0)
        people[:, mine] = _drawn(trials.person[mine], chance, times)
    return _drawn(trials.model, chance, times), people


def _drawn(units: Places, chance: np.random.Generator, times: int) -> Numbers:
    """As many units drawn with replacement as there are: how often each entry's unit came, (times, n)."""
    known, place = np.unique(units, return_inverse=True)
    if not len(known):
        return np.ones((times, 0))
    return chance.multinomial(len(known), np.full(len(known), 1 / len(known)), size=times)[:, place].astype(np.float64)


def _ratio(part: Numbers, whole: Numbers) -> Numbers:
    """Resamples in which nothing is left to compare are no numbers, and left out of intervals."""
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def _interval(mean: float, resamples: Numbers) -> Interval:
    low, high = np.nanquantile(resamples, [0.025, 0.975])
    return Interval(mean, float(low), float(high))
