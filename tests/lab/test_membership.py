"""The arithmetic of attacks on models, against scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from mta_lab.privacy.membership import Trials, attack, resampled_auc, resampled_tpr
from mta_lab.privacy.sampling import spread

pytestmark = pytest.mark.integration


@st.composite
def weighted(draw):
    """Trials under a few models, with integer weights that equal repetitions."""
    n = draw(st.integers(4, 16))
    member = np.array([True, False, *draw(st.lists(st.booleans(), min_size=n - 2, max_size=n - 2))])
    model = np.array(draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    model[1] = model[0]  # one model has both kinds
    person = np.array(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    scores = np.array(draw(st.lists(st.integers(-4, 4), min_size=n, max_size=n)), dtype=float)
    models = np.array(draw(st.lists(st.integers(1, 3), min_size=3, max_size=3)), dtype=float)[model]
    people = np.array(draw(st.lists(st.integers(1, 3), min_size=4, max_size=4)), dtype=float)[person]
    return Trials(model, person, member), scores, models, people


@given(weighted())
def test_resamples_are_scikit_learns_with_weights(drawn):
    trials, scores, models, people = drawn
    above, pairs = 0.0, 0.0
    for model in range(3):
        mine = trials.model == model
        a, b = people[mine & trials.member].sum(), people[mine & ~trials.member].sum()
        if a and b:
            weight = models[mine][0] * a * b
            above += weight * roc_auc_score(trials.member[mine], scores[mine], sample_weight=people[mine])
            pairs += weight
    assert resampled_auc(trials, scores, models[None], people[None])[0] == pytest.approx(above / pairs)
    false, true, _ = roc_curve(trials.member, scores, sample_weight=models * people, drop_intermediate=False)
    for fpr in (0.01, 0.3):
        again = true[false <= fpr + 1e-9].max()
        assert resampled_tpr(trials, scores, models[None], people[None], fpr)[0] == pytest.approx(again)


def crowd(per_person, alike, seed=0):
    """40 members and 40 others with ``per_person`` items each; ``alike``: all items of a person have one score."""
    chance, people = np.random.default_rng(seed), np.arange(80).repeat(per_person)
    member = people < 40
    scores = member * 0.8 + (chance.normal(size=80)[people] if alike else chance.normal(size=len(people)))
    return Trials(np.zeros(len(people), dtype=int), people, member), scores


def test_an_attack_is_the_auc_within_each_model():
    """Scores of different models are not compared, so that a model with higher scores for all items changes nothing."""
    trials = Trials(np.array([0, 0, 0, 1, 1]), np.arange(5), np.array([True, False, False, True, False]))
    found = attack(trials, np.array([2.0, 1.0, 3.0, 20.0, 30.0]))
    assert found.auc.mean == pytest.approx((2 * 0.5 + 1 * 0.0) / 3)  # weighed by their pairs
    only = attack(replace(trials, member=np.array([True, False, False, True, True])), np.array([2.0, 1, 3, 20, 30]))
    assert only.auc.mean == 0.5  # the second model has members alone


def test_people_are_resampled_and_not_items():
    few, many = (attack(*crowd(20, alike)).auc for alike in (True, False))
    assert many.low > 0.5
    assert few.high - few.low > 2 * (many.high - many.low)
    assert few.low <= few.mean <= few.high


def test_items_of_a_models_own_person_are_drawn_with_the_model():
    trials, scores = crowd(5, True)
    own = Trials(trials.person % 40, np.full(len(scores), -1), trials.member)
    assert attack(own, scores).auc.high > attack(own, scores).auc.low
    alone = Trials(np.zeros(len(scores), dtype=int), own.person, trials.member)
    assert attack(alone, scores).auc.high == pytest.approx(attack(alone, scores).auc.low)  # only one model to draw


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 20), st.integers(0, 50))
def test_spread_takes_items_evenly_and_once(sizes, count, turn):
    sets = [[100 * n + i for i in range(size)] for n, size in enumerate(sizes)]
    found = spread(sets, count, turn)
    assert len(found) == len(set(found)) <= count
    assert set(found) <= {number for numbers in sets for number in numbers}
    share = -(-count // len(sets))
    assert len(found) == min(count, sum(min(share, size) for size in sizes))
    assert spread([], count, turn) == []
