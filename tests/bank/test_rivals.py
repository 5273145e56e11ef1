"""What people gain without the bank: each rival against its plain computation."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from arrays import near
from conftest import people_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from tiny import base_of, random_loras

from mta.bank.calibration.choices import rival_of
from mta.bank.calibration.crossfit import RATES, STDS, Calibrator
from mta.bank.calibration.info import ALONE, LABEL_BIAS, OPPU, CalibrationInfo, Gain, Rival, one_step
from mta.bank.calibration.label_bias import bias_gain, features_of, fitted_bias
from mta.bank.calibration.people import subjects_of
from mta.bank.calibration.probes import CalibrationWorker, key_of, run_probe
from mta.bank.card import what_to_expect
from mta.config import CalibrationSettings, Lora, Run, StackSettings
from mta.data.tasks import load_task
from mta.lora.layers import PerPerson, Shared
from mta.personalize.stages import adapt
from mta.training.scoring import label_scores, log_likelihood
from mta.training.trainer import Job

TASK = load_task("movielens-rating")
SHAPES = {ALONE: Lora(rank=1), OPPU: Lora(rank=2)}


@settings(max_examples=30)
@given(
    st.integers(0, 12), st.sampled_from([("1", "2", "3", "4", "5"), ("sport", "news", "art")]), st.integers(0, 2**31)
)
def test_the_bias_is_the_best_one_under_its_prior(shots, labels, seed):
    draws = torch.Generator().manual_seed(seed)
    scores = torch.randn(shots, len(labels), generator=draws, dtype=torch.float64) * 3
    gold, std = torch.randint(len(labels), (shots,), generator=draws), 0.7
    features = features_of(labels)
    bias = fitted_bias(scores, gold, features, std)

    def loss(theta):
        at = features @ torch.from_numpy(theta)
        picked = (scores + at).log_softmax(1)[torch.arange(shots), gold].sum()
        return -float(picked) + float((theta**2).sum()) / std**2 / 2

    best = minimize(loss, np.zeros(features.shape[1]), method="BFGS", options={"gtol": 1e-9})
    torch.testing.assert_close(bias, features @ torch.from_numpy(best.x), rtol=0, atol=1e-4)
    if shots:
        assert bias_gain(scores, gold, bias) >= -1e-9


def test_a_bias_of_numbers_moves_their_mean_and_spread():
    features = features_of(("1", "2", "3", "4", "5"))
    assert features.shape == (5, 2)
    scores = torch.zeros(6, 5)
    high = fitted_bias(scores, torch.tensor([3, 4, 4, 3, 4, 4]), features, 1.0)
    assert high.argmax() == 4
    extreme = fitted_bias(scores, torch.tensor([0, 4, 0, 4, 0, 4]), features, 1.0)
    assert extreme[2] < min(extreme[0], extreme[4])
    assert not fitted_bias(scores, torch.tensor([3, 4, 4, 3, 4, 4]), features, 0.0).any()


@pytest.fixture(scope="module")
def scene():
    base = base_of()
    people = people_of(10, items=12)
    how = CalibrationSettings(people=10, shots=8, queries=4)
    subjects = subjects_of(base, TASK, people, Run(calibration=how))
    anchors, task_lora = random_loras(base, 3, seed=2, size=0.2), random_loras(base, 1, seed=1, size=0.2)
    worker = CalibrationWorker(base, anchors, task_lora, Run(stack=StackSettings(lora=Lora(rank=1))))
    measured = Calibrator(
        subjects,
        3,
        how,
        lambda pieces: [(piece, run_probe(worker, piece)) for piece in pieces],
        rivals=SHAPES,
        labels=TASK.labels,
        together=3,
    )
    measured.first_pass()
    return base, people, task_lora, measured


def test_a_label_bias_is_measured_as_people_would_use_it(scene):
    base, people, task_lora, measured = scene
    found, tried = measured.biased(8)
    assert found.shape == tried.shape == (10, len(STDS))
    for person, gains, turns, tokens in zip(people, found, tried, measured.tokens):
        (scores,) = label_scores(base, TASK, [person.items], [Shared(task_lora)])
        gold = torch.tensor([TASK.labels.index(TASK.target(item)) for item in person.items])
        for std, gain, every in zip(STDS, gains, turns):
            parts = []  # the last four items, those before, and the first four, each from the other eight
            for start in (8, 4, 0):
                asked = torch.isin(torch.arange(12), torch.arange(start, start + 4))
                bias = fitted_bias(scores[~asked], gold[~asked], features_of(TASK.labels), std)
                parts.append(bias_gain(scores[asked], gold[asked], bias) / float(tokens))
            assert float(gain) == pytest.approx(parts[0])
            assert float(every) == pytest.approx(sum(parts))


@pytest.mark.parametrize("name", SHAPES)
def test_a_lora_without_the_bank_is_measured_as_people_would_get_it(scene, name):
    base, _, task_lora, measured = scene
    over = [Shared(task_lora)]
    found = measured.stacked(8, torch.zeros(10, 0).double(), RATES, SHAPES[name])
    jobs = [Job(key_of(one.shots), one.shots) for one in measured.subjects]
    queries = [one.queries for one in measured.subjects]
    before = torch.stack([scores.sum() for scores in log_likelihood(base, queries, over)])
    for place, rate in enumerate(RATES):
        trained = adapt(base, jobs, over, SHAPES[name], one_step(rate))
        after = torch.stack([scores.sum() for scores in log_likelihood(base, queries, [*over, PerPerson(trained)])])
        near(found[:, place], (after - before) / measured.tokens)


def test_a_bank_is_compared_with_what_it_has_to_beat(scene):
    measured = scene[3]
    ours = torch.linspace(-0.1, 0.3, 10).double()
    rivals = measured.rivals_of({4: ours, 8: ours})
    assert [one.name for one in rivals] == [LABEL_BIAS, *SHAPES]
    assert {one.gain.shots for one in rivals} == {8}
    for one in rivals:
        assert one.gain.mean + one.ahead.mean == pytest.approx(float(ours.mean()))
    assert measured.rivals_of({}) == ()


def test_a_rival_takes_its_best_setting_on_average_and_a_lora_without_a_gain_is_the_pooled_model():
    noise = torch.tensor([0.3, -0.3] * 6).double()
    ours, everybody = torch.full((12,), 0.2).double(), torch.ones(12, dtype=torch.bool)

    def rival(settings, gains):
        return rival_of("any", settings, torch.stack(gains, 1).double(), ours, everybody, 8)

    nothing = torch.zeros(12)
    none = rival([0.0, 0.1, 0.2], [nothing, noise - 0.01, -noise - 0.02])
    assert (none.setting, none.gain.mean, none.ahead.mean) == (0.0, 0.0, pytest.approx(0.2))
    clear = rival([0.0, 0.1, 0.2], [nothing, noise, noise / 10 + 0.1])
    assert (clear.setting, clear.gain.mean) == (0.2, pytest.approx(0.1))
    assert rival([0.0, 0.1], [nothing, torch.full((12,), -math.inf)]).setting == 0.0
    unclear = rival([0.0, 0.1], [nothing, noise + 0.1])
    assert (unclear.setting, unclear.gain.mean) == (0.1, pytest.approx(0.1))


def test_the_card_says_which_rivals_are_as_good():
    def rival(name, low):
        gain = Gain(shots=8, people=20, mean=0.03, low=0.01, high=0.05, worse=0.1)
        return Rival(name=name, setting=0.5, gain=gain, ahead=gain.model_copy(update={"low": low}))

    def said(*rivals, history=0, low=0.02):
        gains = (Gain(shots=8, people=20, mean=0.06, low=low, high=0.1, worse=0.1),)
        known = CalibrationInfo(ridge=0.3, prior=4.0, people=20, gains=gains, rivals=rivals)
        run = SimpleNamespace(task_lora=SimpleNamespace(enabled=True, history=history))
        return what_to_expect(SimpleNamespace(calibration=known, plan="plan", run=run, tried=()))

    both = said(rival(LABEL_BIAS, -0.01), rival(OPPU, 0.01))
    assert "label bias +0.030 [-0.010, +0.050], OPPU +0.030 [+0.010, +0.050]" in both
    assert "Not clearly better than label bias: use that, without a bank." in both
    assert "| 8 | label bias | +0.030 [+0.010, +0.050] | 10% | 20 |" in both
    assert "It beats them all." in said(rival(OPPU, 0.01))
    assert "needs no bank" not in said()
    shown = "All prompts show up to 8 earlier items"
    assert (shown in said(history=8), shown in said()) == (True, False)
    alone = "These alone are as good as the bank"
    assert [alone in said(history=8, low=low) for low in (0.02, -0.01)] == [False, True]
