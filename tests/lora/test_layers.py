"""The batched layer against the plain way: dense updates of weights."""

import plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import base_of, random_examples, random_loras

from mta.lora.layers import Gated, PerPerson, Renumbered, Shared, applied
from mta.lora.merge import merge_exact
from mta.lora.terms import RowTerm, SharedTerm, with_terms
from mta.training.scoring import log_likelihood


def logits(base, tokens, adapters, owner):
    with applied(base.model, adapters, torch.tensor(owner)), torch.no_grad():
        return base.model(input_ids=tokens).logits


@pytest.fixture
def tokens():
    return torch.randint(3, 259, (4, 9), generator=torch.Generator().manual_seed(1))


def test_a_row_without_an_adapter_gets_the_base_and_the_model_is_restored(tokens):
    base = base_of()
    people = random_loras(base, 2)
    bare = base.model(input_ids=tokens).logits
    gates = torch.ones(2, 2, dtype=torch.float64)
    mixed = logits(base, tokens, [PerPerson(people), Gated(people, gates)], [-1, 0, -1, 1])
    torch.testing.assert_close(mixed[[0, 2]], bare[[0, 2]], rtol=0, atol=1e-12)
    assert (mixed[1] - bare[1]).abs().max() > 1e-3
    assert torch.equal(base.model(input_ids=tokens).logits, bare)


@pytest.mark.parametrize("per_layer", [False, True])
def test_straight_from_the_bank_equals_the_gathered_merge(per_layer):
    base = base_of()
    bank = random_loras(base, 5)
    jobs = [random_examples(2, seed) for seed in range(3)]
    ids = torch.arange(5).expand(3, 5)
    w = torch.randn(3, len(bank.factors), 5) if per_layer else torch.randn(3, 5)
    w = w.double()
    gathered = log_likelihood(base, jobs, [PerPerson(merge_exact(bank, ids, w))])
    direct = log_likelihood(base, jobs, [Gated(bank, w)])
    for a, b in zip(gathered, direct):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("owner", [[0, 0, 1, 1], [1, 0, 1, 0], [0, 1, -1, 0]], ids=["in order", "mixed", "nobody"])
@pytest.mark.parametrize("parts", ["sp", "gp", "sgp", "sspp", "sg", "gg", "p", "s"])
def test_any_mixture_of_adapters_is_the_sum_of_their_dense_updates(tokens, owner, parts):
    """Terms of a layer are joined; everybody gets what separate ones would have given."""
    base = base_of()
    adapters, dense = [], [[] for _ in owner]
    for seed, kind in enumerate(parts):
        batch = random_loras(base, 1 if kind == "s" else 2, rank=2 + seed, seed=seed, scale=0.4 + seed)
        w = torch.rand(2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        adapters.append({"s": Shared(batch), "g": Gated(batch, w), "p": PerPerson(batch)}[kind])
        for row, who in enumerate(owner):
            if kind == "s":
                dense[row].append(plain.update(batch))
            elif who >= 0:
                dense[row].append(plain.merge(batch, [0, 1], w[who]) if kind == "g" else plain.update(batch, who))
    found = logits(base, tokens, adapters, owner)
    turned = [Renumbered(one, torch.tensor([1, 0])) for one in adapters]
    again = logits(base, tokens, turned, [1 - who if who >= 0 else who for who in owner])
    for row, updates in enumerate(dense):
        expected = plain.logits(base, plain.weights(base, *updates), tokens[row].tolist())
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(again[row], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("parts", ["s", "g", "p", "sgp"])
def test_layers_that_get_all_tokens_in_one_dimension_compute_the_same(parts):
    base, owner = base_of(), torch.tensor([0, 1, 1])
    name, w = base_of().targets.__iter__().__next__(), torch.rand(2, 2, dtype=torch.float64)
    batch = {kind: random_loras(base, 1 if kind == "s" else 2, seed=n) for n, kind in enumerate(parts)}
    kinds = {"s": Shared, "g": lambda b: Gated(b, w), "p": PerPerson}
    layer = base.model.get_submodule(name)
    x = torch.randn(3, 4, layer.in_features, dtype=torch.float64)
    with applied(base.model, [kinds[kind](batch[kind]) for kind in parts], owner), torch.inference_mode():
        torch.testing.assert_close(layer(x.flatten(0, 1)), layer(x).flatten(0, 1), rtol=0, atol=1e-12)


@given(rows=st.integers(1, 4), tokens=st.integers(1, 5), frozen=st.booleans(), flat=st.booleans())
@settings(deadline=None, max_examples=20)
def test_gradients_of_gates_equal_autograd_through_the_plain_sum(rows, tokens, frozen, flat):
    """The layer with gates has a backward pass of its own."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5).double().requires_grad_(False)
    x = torch.randn(*((rows * tokens,) if flat else (rows, tokens)), 6).double().requires_grad_()
    gate = torch.randn(rows, 3).double().requires_grad_()
    own = SharedTerm(torch.randn(3, 6).double(), torch.randn(5, 3).double(), gate)
    others = [SharedTerm(torch.randn(2, 6).double(), torch.randn(5, 2).double())] if frozen else []
    y = with_terms(layer, [own, *others])(x)
    assert type(y.grad_fn).__name__ == "_GatedLinearBackward"
    spread = gate.repeat_interleave(tokens, 0).view(*x.shape[:-1], 3)
    plain = layer(x) + ((x @ own.a.T) * spread) @ own.b.T + sum(x @ term.a.T @ term.b.T for term in others)
    torch.testing.assert_close(y, plain)
    weights = torch.randn_like(y)
    for found, expected in zip(*(torch.autograd.grad((out * weights).sum(), (x, gate)) for out in (y, plain))):
        torch.testing.assert_close(found, expected)


def test_gradients_pass_through_frozen_adapters_of_single_people():
    layer, draw = torch.nn.Linear(6, 5).double().requires_grad_(False), torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=draw).double() for shape in ((2, 1, 6), (2, 5, 1)))
    x = torch.randn(2, 3, 6, generator=draw).double().requires_grad_()
    with_terms(layer, [RowTerm(a, b)])(x).sum().backward()
    dense = layer.weight + torch.bmm(b, a)
    assert torch.allclose(x.grad, dense.sum(1)[:, None].expand_as(x), atol=1e-12)


def test_ranks_that_are_padded_for_a_gpu_change_no_number(monkeypatch):
    layer, draw = torch.nn.Linear(6, 5).double().requires_grad_(False), torch.Generator().manual_seed(0)
    shapes = (2, 3, 6), (2, 1, 6), (2, 5, 1), (2, 4, 6), (2, 5, 4)
    x, a, b, *frozen = (torch.randn(shape, generator=draw).double() for shape in shapes)
    leaves = [part.requires_grad_() for part in (x, a, b)]

    def numbers():
        y = with_terms(layer, [RowTerm(a, b), RowTerm(*frozen)])(x)
        return y, *torch.autograd.grad((y**2).sum(), leaves)

    expected = numbers()
    monkeypatch.setattr("mta.lora.terms._is_faster_even", lambda _: True)
    for found, right in zip(numbers(), expected):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
