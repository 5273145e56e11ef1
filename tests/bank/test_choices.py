"""What a calibration chooses from people's gains."""

import math

import pytest
import torch
from arrays import near, normal
from hypothesis import given
from hypothesis import strategies as st

from mta.bank.calibration.choices import (
    best_of,
    best_on_average,
    chosen_by_others,
    gain_of,
    standard_error,
    surely_best,
)


def test_a_gain_that_is_not_clear_is_not_chosen():
    before, doubtful = normal(20, 1), torch.tensor([0.5, -0.45]).repeat(10)[:, None]
    assert best_of(torch.cat([before, before + doubtful], 1)) == 0
    assert best_of(torch.cat([before, before + doubtful + 0.5], 1)) == 1
    assert best_of(torch.cat([before, before + 0.01], 1)) == 1  # small, but for everybody


def test_a_candidate_that_diverged_is_not_chosen():
    broken = torch.tensor([-math.inf, *[5.0] * 9])[:, None]
    assert best_of(torch.cat([torch.zeros(10, 1), broken, broken * math.nan], 1)) == 0


@pytest.mark.parametrize(("people", "errors"), [(2, 12.706), (8, 2.365), (24, 2.069), (240, 1.970)])
def test_the_interval_of_few_people_is_wider(people, errors):
    """By Student's t; its quantiles are from a table."""
    gains = normal(people, seed=3)
    found = gain_of(8, gains)
    near(standard_error(gains), gains.std(0) / people**0.5)
    assert (found.high - found.low) / 2 == pytest.approx(errors * float(standard_error(gains)), rel=1e-3)


def test_one_person_tells_nothing_of_others():
    assert bool(standard_error(normal(1, 2)).isinf().all())


def test_a_persons_candidate_is_chosen_by_the_others():
    """A person is served with what is best for the others."""
    gains = torch.tensor([[0.0, 9.0, 0.0], [0.0, 8.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])

    def most(some):
        return int(some.mean(0).argmax())

    everybody = torch.ones(5, dtype=torch.bool)
    assert chosen_by_others(gains, everybody, most) == ([1, 1, 1, 1, 1], 1)
    assert chosen_by_others(gains, torch.arange(5) > 0, most) == ([1, 2, 1, 1, 1], 1)


def test_nothing_is_chosen_where_nobody_else_is_counted():
    gains = torch.ones(2, 2).cumsum(1)
    assert chosen_by_others(gains, torch.tensor([True, False]), best_of)[0][0] == 0


@given(people=st.integers(3, 12), seed=st.integers(0, 50))
def test_what_others_chose_is_the_best_candidate_for_them(people, seed):
    gains = normal(people, 3, seed=seed)
    found, _ = chosen_by_others(gains, torch.ones(people, dtype=torch.bool), best_of)
    others = [torch.cat([gains[:u], gains[u + 1 :]]) for u in range(people)]
    assert found == [best_of(some) for some in others]


def test_the_rate_is_the_best_of_those_that_surely_help():
    small = 0.02 + 0.01 * normal(20, seed=1)
    wild = 0.1 + normal(20, seed=2)
    larger = 2 * small
    assert surely_best(torch.stack([0 * small, small, larger, wild], dim=1)) == 2
    assert surely_best(torch.stack([0 * small, wild], dim=1)) == 0


def test_few_people_must_agree_more_before_a_gain_is_sure():
    gains = torch.tensor([1.0, 1.0, 1.0, -0.8])  # 1.2 standard errors; 6 for four times as many people as these
    tried = torch.stack([0 * gains, gains], dim=1)
    assert surely_best(tried) == 0
    assert surely_best(tried.repeat(25, 1)) == 1


def test_the_best_on_average_is_a_number():
    gains = torch.tensor([[0.0, 2.0, math.nan, 9.0], [0.0, -1.0, 1.0, -math.inf]])
    assert best_on_average(gains) == 1
    assert best_on_average(gains[:0]) == 0
    assert best_on_average(-gains[:, :2].abs()) == 0
