"""Calibrations: coefficients, curvature, and prior against their formulas, and what a run leaves to them."""

import math
from dataclasses import replace

import pytest
import torch
from arrays import near, normal
from hypothesis import given
from hypothesis import strategies as st

from mta.bank.calibration.info import CalibrationInfo, Gain, one_step, with_calibrated_settings
from mta.bank.calibration.laplace import BOUNDLESS, Calibration, curvature_of, prior_of, solved
from mta.bank.card import in_words
from mta.config import MergeSettings, Run, StackSettings, Training, override

N = 4
CALIBRATION = Calibration(0.1 * normal(N), curvature_of(normal(50, N, seed=1)), CalibrationInfo(ridge=0.3, prior=8.0))

# -- coefficients ------------------------------------------------------------------------------------------------------


def test_coefficients_maximize_the_quadratic_model_with_its_prior():
    gradients, loglik, shots = normal(3, N, seed=2), torch.tensor([-2.0, -9.0, -7.0]), torch.tensor([1, 4, 9])
    found = CALIBRATION.coefficients(gradients, loglik, shots)
    for u in range(3):
        w, mean, loss = found[u].clone().requires_grad_(), gradients[u] / shots[u], -loglik[u] / shots[u]
        curvature = CALIBRATION.curvature + torch.outer(mean, mean) / loss
        curvature = curvature + 0.3 * CALIBRATION.curvature.diagonal().mean() * torch.eye(N)
        d = w - CALIBRATION.mu
        objective = gradients[u] @ d - (shots[u] + 8.0) / 2 * d @ curvature @ d
        near(torch.autograd.grad(objective, w)[0], torch.zeros(N).double(), 1e-7)


@given(size=st.floats(1e-3, 1e6), loss=st.floats(1e-3, 1e3), shots=st.integers(1, 20))
def test_no_step_promises_more_than_the_shots_loss(size, loss, shots):
    gradient = size * normal(1, N, seed=2)
    found = CALIBRATION.coefficients(gradient, torch.tensor([-loss]), torch.tensor([shots]))
    assert 0 < float((gradient * (found - CALIBRATION.mu)).sum()) < loss


def test_shots_that_are_certain_already_change_nothing():
    near(CALIBRATION.coefficients(normal(1, N), torch.zeros(1), torch.tensor([3])), CALIBRATION.mu[None])


def test_without_shots_the_coefficients_are_those_of_the_population():
    near(CALIBRATION.coefficients(torch.zeros(2, N), torch.zeros(2), torch.zeros(2)), CALIBRATION.mu.expand(2, N))


def test_without_any_curvature_the_coefficients_are_those_of_the_population():
    flat = replace(CALIBRATION, curvature=torch.zeros(N, N).double())
    near(flat.coefficients(normal(2, N), torch.tensor([-4, -5]), torch.tensor([3, 5])), flat.mu.expand(2, N))


@given(shots=st.integers(2, 12))
def test_curvature_is_positive_however_few_the_shots(shots):
    found = curvature_of(normal(shots, N, seed=shots))
    near(found, found.T)
    assert float(torch.linalg.eigvalsh(found)[0]) > 0
    gradients = normal(3, N, seed=9)
    assert bool(((solved(found, 0.1, gradients) * gradients).sum(1) > 0).all())


def people_who_differ(by: float, counts=(4, 8, 12), times=200) -> list[torch.Tensor]:
    """Gradients of people's shots: variance 1 within people, ``by`` between them."""
    return [normal(n, N, seed=u) + math.sqrt(by) * normal(1, N, seed=10_000 + u) for u, n in enumerate(counts * times)]


@pytest.mark.parametrize("prior", [0.5, 2.0, 8.0])
def test_the_prior_is_the_variance_within_people_over_that_between_them(prior):
    people = people_who_differ(1 / prior)
    assert prior_of(people, [0] * len(people), torch.eye(N).double(), 0.3) == pytest.approx(prior, rel=0.15)


def test_where_people_do_not_differ_all_get_mu():
    def prior(people, folds=(0,) * 600):
        return prior_of(people, folds[: len(people)], torch.eye(N).double(), 0.3)

    assert prior(people_who_differ(0)) > 100
    assert prior([normal(5, N)] * 4) == 1e6  # the variance between people is below what chance gives
    assert prior([normal(1, N, seed=u) for u in range(9)]) == 1e6  # one shot each
    assert prior([normal(9, N)]) == 1e6
    assert prior([normal(9, N), normal(9, N, seed=1)], [0, 1]) == 1e6  # nobody can be compared
    twin = normal(1, N).expand(2, -1)
    assert prior([twin, *(normal(1, N, seed=u) for u in range(9))]) == 1e6  # one person says nothing of the variance


@given(fold=st.lists(st.integers(0, 1), min_size=6, max_size=6))
def test_the_prior_compares_people_of_one_fold_only(fold):
    """The gradients of each fold are at another mu: that difference says nothing about people."""
    people, curvature, far = people_who_differ(1.0, times=2), curvature_of(normal(30, N)), 5 * normal(2, N, seed=9)
    moved = [rows + far[f] for rows, f in zip(people, fold)]
    near(prior_of(moved, fold, curvature, 0.3), prior_of(people, fold, curvature, 0.3), 1e-6)


@given(order=st.permutations(range(6)))
def test_the_prior_does_not_depend_on_the_order_or_on_coordinates(order):
    people, curvature, turn = people_who_differ(1.0, times=2), curvature_of(normal(30, N)), normal(N, N, seed=3)
    folds = [0, 1, 0, 1, 0, 0]
    whole = prior_of(people, folds, curvature, 0.0)
    near(prior_of([people[u].flip(0) for u in order], [folds[u] for u in order], curvature, 0.0), whole)
    near(prior_of([rows @ turn.T for rows in people], folds, turn @ curvature @ turn.T, 0.0), whole, 1e-6)


# -- what a run leaves to the calibration ------------------------------------------------------------------------------

SHAPE = Run().stack.lora
FOUND = CalibrationInfo(
    ridge=1.0, prior=8.0, rate=3.2e-3, gains=(Gain(shots=8, people=9, mean=0, low=0, high=0, worse=0),)
)


def test_a_run_follows_the_calibration():
    run = with_calibrated_settings(Run(), FOUND, SHAPE)
    assert (run.merge.policy, run.stack.training) == ("laplace", one_step(3.2e-3))
    assert with_calibrated_settings(run, FOUND, SHAPE) == run


def test_without_a_calibration_a_run_takes_the_posterior_and_its_own_stack():
    run = with_calibrated_settings(Run(), None, SHAPE)
    assert (run.merge.policy, run.stack.training) == ("posterior", Run().stack.training)


@pytest.mark.parametrize(
    "run",
    [
        override(Run(), ["stack.training.steps=2", "merge.policy=ridge"]),
        Run.model_validate({"stack": {"training": {"steps": 2}}, "merge": {"policy": "ridge"}}),
        Run(stack=StackSettings(training=Training(steps=2)), merge=MergeSettings(policy="ridge")),
    ],
    ids=["words", "file", "Python"],
)
def test_what_is_given_counts(run):
    found = with_calibrated_settings(run, FOUND, SHAPE)
    assert (found.merge.policy, found.stack.training.steps) == ("ridge", 2)


@pytest.mark.parametrize("words", [["merge.k=2"], ["merge.policy=similarity"]])
def test_a_calibration_is_for_merges_of_all_anchors_by_laplace(words):
    run = with_calibrated_settings(override(Run(), words), FOUND, SHAPE)
    assert run.merge.policy in ("posterior", "similarity")
    assert run.stack.training == Run().stack.training


@pytest.mark.parametrize("words", [["stack.lora.rank=8"], ["merge.scale=0.5"]])
@pytest.mark.parametrize("rate", [0.0, 3.2e-3])
def test_a_calibration_is_for_stacks_of_its_shape_over_merges_as_they_are(words, rate):
    run = with_calibrated_settings(override(Run(), words), FOUND.model_copy(update={"rate": rate}), SHAPE)
    assert run.merge.policy == "laplace"
    assert (run.stack.enabled, run.stack.training) == (True, Run().stack.training)


def test_a_stack_that_does_not_help_is_not_trained():
    assert not with_calibrated_settings(Run(), FOUND.model_copy(update={"rate": 0.0}), SHAPE).stack.enabled


@pytest.mark.parametrize(("mean", "said"), [(0.0, False), (0.1, True)])
def test_the_card_speaks_of_the_population_only_where_merges_help(mean, said):
    gain = FOUND.gains[0].model_copy(update={"mean": mean})
    found = FOUND.model_copy(update={"prior": BOUNDLESS, "gains": (gain,)})
    assert ("the population's best merge" in in_words(found)) == said
