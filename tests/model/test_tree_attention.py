"""Blocked attention against dense masks: the same numbers, whatever the tree and however it is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import base_of, new_base, random_examples, random_loras, rows_of

from mta.errors import ConfigError, UnsupportedModel
from mta.lora.layers import PerPerson
from mta.model.flex import tree_mask
from mta.model.tree_attention import additive, blocks_of, can_block, tree_attention, visible
from mta.training.scoring import log_likelihood

CPU = torch.device("cpu")


@settings(max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.sampled_from([3, 12, 60]), st.sampled_from([1, 2]))
def test_blocked_attention_equals_attention_with_dense_masks(sizes, longest, share):
    rows = rows_of(sizes, longest)
    batch, tokens = rows.tokens.shape
    draw = torch.Generator().manual_seed(7)
    drawn = [torch.randn((batch, tokens, n, 4), generator=draw, dtype=torch.float64) for n in (2 * share, 2, 2)]
    inputs = [x.transpose(1, 2).requires_grad_() for x in drawn]  # as models give them
    blocks = blocks_of(rows.ends, rows.positions)
    mask = additive(blocks.seen, torch.float64)
    found, _ = tree_attention(None, *inputs, mask, scaling=0.3, blocks=blocks)
    tree = tree_mask(rows.ends, rows.positions, lambda query, key: True)
    flex, _ = tree_attention(None, *(x.detach() for x in inputs), tree, scaling=0.3)
    spread = [x.repeat_interleave(share, 1) for x in inputs[1:]]
    how = {"attn_mask": visible(rows.ends).unsqueeze(1), "scale": 0.3}
    dense = torch.nn.functional.scaled_dot_product_attention(inputs[0], *spread, **how).transpose(1, 2)
    real = rows.ends > torch.arange(1, tokens + 1)
    real |= rows.positions > 0  # what is left is padding, whose output nobody reads
    for out in (found, flex):
        torch.testing.assert_close(out[real], dense[real], rtol=0, atol=1e-12)
    weight = torch.randn(found[real].shape, generator=draw, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((out[real] * weight).sum(), inputs) for out in (found, dense))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral"])
def test_flex_attention_gives_the_model_the_same_logits(kind, monkeypatch):
    base = base_of(kind)
    people, jobs = [PerPerson(random_loras(base, 2))], [random_examples(5, 1), random_examples(3, 2)]
    expected = log_likelihood(base, jobs, people)
    monkeypatch.setattr(base, "flexible", True)
    monkeypatch.setattr("mta.model.base.blocks_of", None)  # fails if it is called
    for found, right in zip(log_likelihood(base, jobs, people), expected):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-9)


def test_the_environment_chooses_flex_attention_which_is_checked_as_blocks_are(monkeypatch):
    monkeypatch.setenv("MTA_ATTENTION", "flex")
    assert not new_base().flexible  # on a CPU
    monkeypatch.setattr("mta.model.flex.wanted", lambda device: True)
    assert new_base().flexible
    monkeypatch.setattr("mta.model.flex.attention", lambda query, *_: query.transpose(1, 2))
    wrong = new_base()
    assert (wrong.blocked, wrong.flexible) == (True, False)
    monkeypatch.undo()
    monkeypatch.setenv("MTA_ATTENTION", "fast")
    with pytest.raises(ConfigError, match="MTA_ATTENTION is 'fast'"):
        new_base()


def test_every_token_is_in_one_block_and_sees_its_ancestors():
    rows = rows_of([5, 2], longest=40)
    blocks, tokens = blocks_of(rows.ends, rows.positions), rows.tokens.shape[1]
    assert torch.equal(blocks.queries.flatten()[blocks.place], torch.arange(2 * tokens))
    dense = torch.zeros(2 * tokens, 2 * tokens, dtype=torch.bool)
    for queries, keys, seen in zip(blocks.queries, blocks.keys, blocks.seen):
        q, k = seen.nonzero(as_tuple=True)
        dense[queries[q], keys[k]] = True
    for row, expected in enumerate(visible(rows.ends)):
        here = slice(row * tokens, (row + 1) * tokens)
        assert torch.equal(dense[here, here], expected)
        assert int(dense[here].sum()) == int(expected.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocked_attention_in_low_precision_is_close_to_dense_masks(dtype):
    base, dense = base_of(dtype=dtype), base_of(dtype=dtype)
    dense.blocked = False
    people, jobs = [PerPerson(random_loras(base, 2))], [random_examples(5, 1), random_examples(3, 2)]
    for found, expected in zip(log_likelihood(base, jobs, people), log_likelihood(dense, jobs, people)):
        torch.testing.assert_close(found, expected, rtol=0.02 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)


def test_a_model_that_drops_keywords_on_the_way_keeps_dense_masks(monkeypatch):
    import mta.model.tree_attention as module

    taken = module.tree_attention
    monkeypatch.setattr(module, "tree_attention", lambda *args, blocks=None, **how: taken(*args, **how))
    base = new_base()
    monkeypatch.undo()
    assert not base.blocked
    jobs = [random_examples(4, 1)]
    found, whole = log_likelihood(base, jobs), log_likelihood(new_base(), jobs)  # which puts the real one back
    torch.testing.assert_close(found[0], whole[0], rtol=0, atol=1e-9)


def test_models_that_modify_attention_scores_keep_dense_masks_or_are_refused():
    model = base_of().model
    model.config.attn_logit_softcapping = 30.0
    assert not can_block(model)
    x = torch.randn(1, 1, 2, 4)
    blocks = blocks_of(torch.full((1, 2), 2), torch.arange(2)[None])
    with pytest.raises(UnsupportedModel, match="uses s_aux, which token trees do not support"):
        tree_attention(None, x, x, x, additive(blocks.seen, x.dtype), blocks=blocks, s_aux=x)
