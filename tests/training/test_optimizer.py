"""The batched AdamW against torch's, one optimizer per person."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mta.config import Training
from mta.training.optimizer import BatchedAdamW, learning_rate


def test_equals_torch_adamw_with_a_schedule_and_clipping():
    training = Training(lr=0.03, schedule="linear", warmup=0.3, weight_decay=0.1, clip=0.5, eps=1e-8)
    g = torch.Generator().manual_seed(0)
    values = torch.randn(4, 37, generator=g, dtype=torch.float64)
    steps = [9, 5, 9, 7]
    ours = BatchedAdamW.of(values.clone())
    theirs = [torch.nn.Parameter(row.clone()) for row in values]
    optimizers = [torch.optim.AdamW([p], lr=1.0, weight_decay=0.1) for p in theirs]
    active = list(range(4))
    finished = {}
    for step in range(9):
        gradients = torch.randn(4, 37, generator=g, dtype=torch.float64)
        ours.gradient.copy_(gradients[active])
        rates = torch.tensor([learning_rate(training, step, steps[u], 1) for u in active], dtype=torch.float64)
        ours.update(rates, training)
        for rate, u in zip(rates, active):
            theirs[u].grad = gradients[u].clone()
            torch.nn.utils.clip_grad_norm_([theirs[u]], training.clip)
            optimizers[u].param_groups[0]["lr"] = float(rate)
            optimizers[u].step()
        stays = [i for i, u in enumerate(active) if steps[u] > step + 1]
        finished |= {u: ours.values[i].clone() for i, u in enumerate(active) if i not in stays}
        ours.keep(torch.tensor(stays, dtype=torch.long))
        active = [active[i] for i in stays]
    for u in range(4):
        torch.testing.assert_close(finished[u], theirs[u].data, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        ("linear", lambda s: (s + 1) / 3 if s < 3 else 1 - (s - 3) / 7),
        ("constant", lambda s: (s + 1) / 3 if s < 3 else 1.0),
        ("cosine", lambda s: (s + 1) / 3 if s < 3 else (1 + math.cos(math.pi * (s - 3) / 7)) / 2),
    ],
)
def test_schedules(schedule, reference):
    training = Training(lr=2.0, schedule=schedule, warmup=0.3)
    assert [learning_rate(training, s, 10, 1) for s in range(10)] == pytest.approx(
        [2 * reference(s) for s in range(10)]
    )


class Counted(TorchDispatchMode):
    """Counts the operations that are dispatched: each is a kernel launch on a GPU."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


def test_an_update_off_the_cpu_launches_the_same_number_of_kernels_for_any_number_of_parameters():
    def launched(width: int) -> int:
        optimizer = BatchedAdamW.of(torch.zeros(2, width, device="meta"))
        with Counted() as counted:
            optimizer.update(torch.ones(2, dtype=torch.float64), Training())
        return counted.calls

    assert launched(100) == launched(10_000_000) > 0


def test_few_examples_lower_the_rate():
    training = Training(lr=0.3, steps=1, lr_shrink_examples=8)
    assert [learning_rate(training, 0, 1, n) for n in (1, 8, 800)] == pytest.approx([0.3 / 9, 0.15, 0.3 * 800 / 808])


@given(parts=st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_rates_of_a_growing_history_add_up_to_that_of_the_whole_one(parts):
    """Otherwise a stack that is updated often would grow without limit."""
    training, known = Training(lr=0.3, steps=1, lr_shrink_examples=8), [sum(parts[:n]) for n in range(len(parts))]
    rates = [learning_rate(training, 0, 1, n, before) for n, before in zip(parts, known)]
    assert sum(rates) == pytest.approx(learning_rate(training, 0, 1, sum(parts)))
    assert min(rates) > 0


@given(n=st.integers(1, 400))
def test_without_a_prior_the_rate_is_exactly_the_given_one(n):
    assert learning_rate(Training(lr=2e-4, steps=1), 0, 1, n, examples_before=n) == 2e-4
