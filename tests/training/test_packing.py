"""Packed rows against separate ones: the same likelihoods, losses and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import base_of, random_examples, random_loras, unpacked

from mta.data.tasks.prompt import Example
from mta.lora.layers import PerPerson, applied
from mta.model.tree_attention import visible
from mta.training.packing import collate, pack, tree
from mta.training.scoring import log_likelihood
from mta.training.trainer import _passes

tokens = st.lists(st.integers(3, 6), min_size=2, max_size=9).map(tuple)
examples = st.lists(
    tokens.flatmap(lambda t: st.builds(Example, st.just(t), st.integers(1, len(t) - 1))), min_size=1, max_size=6
)


@settings(deadline=None)
@given(examples)
def test_a_tree_holds_every_example_once(made):
    """Following the ancestors of each predicting place gives back the example's tokens."""
    row = tree(made, range(len(made)))
    for number, example in enumerate(made):
        mine = [(s, t) for s, t, e in zip(row.sources, row.targets, row.examples) if e == number]
        assert [t for _, t in mine] == list(example.target)
        last = mine[-1][0]
        path = [j for j in range(last + 1) if j <= last < row.ends[j]]
        assert tuple(row.tokens[j] for j in path) == example.tokens[:-1]
        assert [row.positions[j] for j in path] == list(range(len(path)))
    assert len(row.tokens) == len({e.tokens[:d] for e in made for d in range(1, len(e.tokens))})


@settings(deadline=None)
@given(examples, st.floats(0, 2), st.booleans())
def test_packing_never_costs_more_than_one_row_per_example(made, price, blocked):
    def cost(rows):
        deepest = [max(r.positions) + 1 if blocked else len(r.tokens) for r in rows]
        return sum(len(r.tokens) * (1 + price * seen) for r, seen in zip(rows, deepest))

    rows = pack(made, price, blocked=blocked)
    assert cost(rows) <= cost(pack(made, price, budget=0)) + 1e-9
    assert sorted({e for r in rows for e in r.examples}) == list(range(len(made)))


@settings(deadline=None)
@given(
    st.lists(st.lists(examples, max_size=3), min_size=1, max_size=8), st.integers(1, 60), st.sampled_from([0.0, 1.5])
)
def test_passes_hold_neighbors_as_long_as_they_fit(people, budget, weight):
    rows = [[tree(made, range(len(made))) for made in own] for own in people]

    def size(part):
        return max(len(row.tokens) for row in part) * len(part) + weight * sum(row.logit_count for row in part)

    found = list(_passes(rows, budget, weight))
    assert [row for one in found for row in one.rows] == [row for own in rows for row in own]
    assert [p for one in found for p in one.owners] == [p for p, own in enumerate(rows) for _ in own]
    for one, after in zip(found, [*found[1:], None]):
        assert len(one.rows) == 1 or size(one.rows) <= budget
        assert {*one.owners} <= {*range(one.people.start, one.people.stop)}
        if after and after.owners[0] != one.owners[-1]:  # else one person has several passes
            assert size([*one.rows, *rows[after.owners[0]]]) > budget


def test_a_row_is_split_when_attention_is_expensive():
    made = random_examples(6, 0)
    assert len(pack(made, 0.0)) == 1
    assert len(pack(made, 10.0)) == 6


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2"])
def test_packed_equals_padded_equals_plain(kind):
    """Long enough for the sliding windows of 5 tokens to matter."""
    base = base_of(kind)
    jobs = [random_examples(n, seed=n) for n in (3, 5, 1)]
    people = [PerPerson(random_loras(base, 3))]
    packed = log_likelihood(base, jobs, people)
    padded = log_likelihood(unpacked(base), jobs, people)
    small = log_likelihood(base, jobs, people, tokens_per_batch=1)
    assert base.blocked
    for u, theirs in enumerate(jobs):
        torch.testing.assert_close(packed[u], padded[u], rtol=0, atol=1e-9)
        torch.testing.assert_close(packed[u], small[u], rtol=0, atol=1e-9)
        alone = [PerPerson(people[0].batch.select([u]))]
        for e, example in enumerate(theirs):
            torch.testing.assert_close(packed[u][e], plain(base, example, alone), rtol=0, atol=1e-9)


def plain(base, example, adapters):
    """The model's own forward on one unpadded example, no mask or position of ours."""
    with torch.no_grad(), applied(base.model, adapters, torch.zeros(1, dtype=torch.long)):
        table = base.model(input_ids=torch.tensor([example.tokens])).logits[0].log_softmax(-1)
    places = range(example.target_start, len(example.tokens))
    return torch.stack([table[i - 1, example.tokens[i]] for i in places]).sum()


def test_equal_examples_of_one_owner_are_computed_once(monkeypatch):
    base, some, fed = base_of(), random_examples(4, 0), []
    logits = type(base).logits
    monkeypatch.setattr(type(base), "logits", lambda *given: fed.append(given[1].numel()) or logits(*given))
    (once,) = log_likelihood(base, [some])
    together = log_likelihood(base, [some, some[::-1], some[1:]])
    assert fed == [fed[0]] * 2
    torch.testing.assert_close(torch.cat(together), torch.cat([once, once.flip(0), once[1:]]), rtol=0, atol=1e-9)
    people = PerPerson(random_loras(base, 2))
    *both, third = log_likelihood(base, [some, some, some[::-1]], [people], owners=[0, 1, 0])
    assert torch.equal(both[0], third.flip(0))
    torch.testing.assert_close(both, log_likelihood(base, [some, some], [people]), rtol=0, atol=1e-9)


def test_padding_sees_itself_only():
    rows = collate([tree(random_examples(1, 0), [0]), tree(random_examples(3, 1), [0, 1, 2])], 0, torch.device("cpu"))
    seen = visible(rows.ends)
    length = int((rows.ends[0] > torch.arange(rows.ends.shape[1])).sum())
    assert seen.diagonal(dim1=1, dim2=2).all()
    real = len(tree(random_examples(1, 0), [0]).tokens)
    assert not seen[0, :real, real:].any()
    assert torch.equal(seen[0, real:], torch.eye(length, dtype=torch.bool)[real:])
