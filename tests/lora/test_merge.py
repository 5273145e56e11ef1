"""Stage 2's algebra against dense sums."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mta.lora.batch import Factors, LoraBatch
from mta.lora.merge import merge_exact, truncate


def bank_of(n: int, rank: int, seed: int, scale: float = 0.7) -> LoraBatch:
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (5, 7), "b": (7, 4)}
    draw = lambda *s: torch.randn(s, generator=g, dtype=torch.float64)  # noqa: E731
    return LoraBatch({name: Factors(draw(n, rank, d), draw(n, o, rank)) for name, (d, o) in shapes.items()}, scale)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_exact_merge_is_the_dense_sum(n, k, rank, per_layer, seed):
    bank = bank_of(n, rank, seed)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, n, (3, k), generator=g)
    w = torch.randn((3, 2, k) if per_layer else (3, k), generator=g, dtype=torch.float64)
    merged = merge_exact(bank, ids, w)
    assert merged.rank == k * rank
    for layer, name in enumerate(bank.names):
        share = w[:, layer] if per_layer else w
        dense = torch.einsum("uk,ukod->uod", share, bank.delta(name)[ids])
        torch.testing.assert_close(merged.delta(name), dense, rtol=0, atol=1e-12)


def test_svd_is_exact_at_full_rank_and_optimal_below():
    bank, ids = bank_of(3, 2, 0), torch.tensor([[0, 1], [2, 1]])
    w = torch.tensor([[0.3, 0.7], [1.0, -0.5]], dtype=torch.float64)
    exact = merge_exact(bank, ids, w)
    full, none = truncate(merge_exact(bank, ids, w), 4)
    cut, error = truncate(merge_exact(bank, ids, w), 2)
    assert cut.rank == 2
    assert none.max() < 1e-7
    lost = sum(((exact.delta(n) - cut.delta(n)) ** 2).sum((1, 2)) for n in bank.names)
    total = sum((exact.delta(n) ** 2).sum((1, 2)) for n in bank.names)
    torch.testing.assert_close(error, (lost / total).sqrt())
    for name in bank.names:
        torch.testing.assert_close(full.delta(name), exact.delta(name), rtol=0, atol=1e-12)
        best = torch.linalg.svdvals(exact.delta(name))[:, 2:].norm(dim=1)
        torch.testing.assert_close((exact.delta(name) - cut.delta(name)).flatten(1).norm(dim=1), best)
