"""Coefficients that are updated by new shots alone equal those of all shots at once."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mta.config import MergeSettings
from mta.personalize.evidence import Evidence, Labels
from mta.personalize.merge import Merge, updated_coefficients
from mta.personalize.policies import PolicyInput, policy_named

U, N, C = 2, 4, 3


def evidence(shots: int, seed: int) -> Evidence:
    """Random scores of labels under the pooled model and N anchors."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.log_softmax(torch.randn(U, shots, C, 1 + N, generator=draw, dtype=torch.float64), dim=2)
    gold = torch.randint(0, C, (U, shots), generator=draw)
    right = scores.gather(2, gold[..., None, None].expand(U, shots, 1, 1 + N))[:, :, 0]
    counts = torch.randint(1, 5, (U, shots), generator=draw).double()
    return Evidence(right, counts, Labels(scores, gold))


@given(
    st.integers(0, 50),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["posterior", "loss"]),
    st.floats(0.5, 8),
    st.floats(0.5, 2),
)
def test_two_helpings_of_shots_say_what_all_at_once_say(seed, first, more, policy, warmth, scale):
    tau = {"tau": warmth / 8} if policy == "loss" else {}
    settings = MergeSettings(policy=policy, temperature=warmth, scale=scale, options=tau)
    one, other = evidence(first, seed), evidence(more, seed + 1000)
    ids = torch.arange(N).expand(U, N)
    near = torch.zeros(U, N, dtype=torch.float64)
    weigh = policy_named(policy).weigh
    before = scale * weigh(settings, PolicyInput(ids, near, one))
    parts = ((a.loglik, a.counts, a.labels.scores, a.labels.gold) for a in (one, other))
    loglik, counts, scores, gold = (torch.cat(pair, 1) for pair in zip(*parts))
    both = Evidence(loglik, counts, Labels(scores, gold))
    whole = scale * weigh(settings, PolicyInput(ids, near, both))
    found = updated_coefficients(settings, Merge(ids, before), other, one.tokens)
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-12)


def test_ridge_stays_where_it_was_unless_the_new_items_say_otherwise():
    settings, ids = MergeSettings(policy="ridge", options={"strength": 1e9}), torch.arange(N).expand(U, N)
    before = torch.tensor([[0.3, -0.2, 0.0, 0.1]] * U, dtype=torch.float64)
    stiff = updated_coefficients(settings, Merge(ids, before), evidence(3, 0), torch.ones(U))
    torch.testing.assert_close(stiff, before, rtol=0, atol=1e-6)
    free = updated_coefficients(
        settings.model_copy(update={"options": {"strength": 1.0}}), Merge(ids, before), evidence(3, 0), torch.ones(U)
    )
    assert (free - before).abs().min() > 1e-4


def test_a_null_that_is_as_good_as_gone_comes_back():
    settings, ids = MergeSettings(policy="posterior", temperature=1.0), torch.arange(N).expand(U, N)
    sure = torch.zeros(U, N, dtype=torch.float32)
    sure[:, 0] = 1.0
    against = evidence(4, 0)
    against.loglik[:, :, 1:] -= 30.0
    assert float(updated_coefficients(settings, Merge(ids, sure), against, torch.ones(U)).sum(1).max()) < 0.01
