import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from mta.evaluation.statistics import Resampled
from mta_lab.reports.sets import corrected


def spread(p):
    """A mean of about 1 whose p-value is ``p``."""
    below = round(p * 10_001 / 2) - 1
    return Resampled(1.0, torch.cat([-torch.ones(below), torch.linspace(0.5, 1.5, 10_000 - below)]).double(), 100)


def test_many_tests_are_corrected_by_holm_and_bonferroni():
    found = corrected([spread(p) for p in (0.04, 0.001, 0.03, 0.012)])
    assert [p for _, p in found] == pytest.approx([0.06, 0.004, 0.06, 0.036], abs=1e-3)  # 0.03 * 2 holds for 0.04, too
    assert [one for one, _ in found] == [spread(p).interval(1 - 0.05 / 4) for p in (0.04, 0.001, 0.03, 0.012)]
    assert [one.low > 0 for one, _ in found] == [False, True, False, True]
    assert corrected([]) == []
    two = corrected([spread(0.01), spread(0.02)], planned=4)
    assert [p for _, p in two] == pytest.approx([4 * spread(0.01).p, 3 * spread(0.02).p])
    assert corrected([spread(0.04)]) == [(spread(0.04).interval(), spread(0.04).p)]


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_corrections_do_not_depend_on_the_order_and_only_raise_p_values(raw, random):
    tests = [spread(p) for p in raw]
    order = random.sample(range(len(tests)), len(tests))
    found, shuffled = corrected(tests), corrected([tests[n] for n in order])
    assert [interval for interval, _ in shuffled] == [found[n][0] for n in order]
    assert [p for _, p in shuffled] == pytest.approx([found[n][1] for n in order])
    assert all(p >= test.p for (_, p), test in zip(found, tests))
    assert all(p < 0.055 for one, p in found if one.low > 0)  # one draw more than 5%, at most
