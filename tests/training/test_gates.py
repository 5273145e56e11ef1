"""The gradient in the coefficients of a merge against autograd through dense merged weights."""

import plain
import pytest
import torch
from arrays import near
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import base_of, random_examples, random_loras, unpacked

from mta.lora.layers import Shared
from mta.training.gates import gate_gradients, units_of
from mta.training.trainer import Job

N = 4


@pytest.fixture(scope="module")
def scene():
    """A base, a task LoRA, a bank of four anchors, three people with shots, and their coefficients."""
    base = base_of()
    jobs = [Job(f"p{n}", random_examples(n, seed=n)) for n in (3, 1, 5)]
    at = 0.3 * torch.randn(3, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return base, random_loras(base, 1, seed=1, size=0.2), random_loras(base, N, seed=2, size=0.2), jobs, at


def dense(scene, u, w) -> torch.Tensor:
    """The log-likelihood of person u's shots with the merge added into copies of the weights; w (N,)."""
    base, task, bank, jobs, _ = scene
    changed = plain.weights(base, plain.update(task), plain.merge(bank, range(N), w))
    return sum(plain.log_likelihood(base, changed, example) for example in jobs[u].examples)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("length", [1.0, 0.0])  # at 0, products that would add zeros are left out
def test_gradients_equal_autograd_through_dense_merges(scene, packed, length):
    base, task, bank, jobs, at = scene
    at = length * at
    found = gate_gradients(base if packed else unpacked(base), jobs, bank, at, [Shared(task)])
    for u in range(3):
        w = at[u].clone().requires_grad_()
        loglik = dense(scene, u, w)
        near(found.loglik[u], loglik.detach())
        near(found.gradients[u], torch.autograd.grad(loglik, w)[0])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=5))
def test_the_same_examples_of_many_people_are_computed_once(scene, answers):
    base, task, bank, _, at = scene
    known = random_examples(6, seed=9)
    jobs = [Job(str(u), [known[n] for n in own]) for u, own in enumerate(answers)]
    points = at[[u % 2 for u in range(len(jobs))]]  # two points, as of the folds of a calibration
    found = gate_gradients(base, jobs, bank, points, [Shared(task)])
    for u, job in enumerate(jobs):
        alone = gate_gradients(base, [job], bank, points[u], [Shared(task)])
        near(found.gradients[u], alone.gradients[0])
        near(found.loglik[u], alone.loglik[0])


def test_twenty_people_with_the_same_answers_cost_one_pass(scene):
    known = random_examples(3, seed=9)
    shared, own = [(0, (example,)) for example in known], [(n, tuple(known)) for n in range(20)]
    assert units_of([known] * 20, [0] * 20) == (shared, [[0, 1, 2]] * 20)
    assert units_of([known] * 20, range(20)) == (own, [[n] for n in range(20)])  # at points of their own


def test_a_person_without_shots_has_no_gradient(scene):
    base, task, bank, jobs, at = scene
    jobs = [jobs[0], Job("none", []), jobs[2]]
    found, alone = (gate_gradients(base, one, bank, at[: len(one)], [Shared(task)]) for one in (jobs, jobs[:1]))
    assert not found.gradients[1].any()
    assert found.loglik[1] == 0
    near(found.gradients[0], alone.gradients[0])


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(3)), most=st.integers(1, 3), budget=st.sampled_from([1, 40, 200, 4096]))
def test_gradients_do_not_depend_on_mates_order_or_passes(scene, order, most, budget):
    base, task, bank, jobs, at = scene
    chosen = order[:most]
    whole = gate_gradients(base, jobs, bank, at, [Shared(task)])
    found = gate_gradients(base, [jobs[u] for u in chosen], bank, at[chosen], [Shared(task)], tokens_per_batch=budget)
    near(found.gradients, whole.gradients[chosen])
    near(found.loglik, whole.loglik[chosen])
