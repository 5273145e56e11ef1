"""Bases whose RoPE chooses the frequencies of a whole pass by its longest text."""

import logging

import pytest
import torch
from tiny import COMMON, random_examples, tokenizer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from mta.data.tasks.prompt import Example
from mta.model.base import BaseModel
from mta.training.scoring import log_likelihood

ORIGINAL = 64  # tokens
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [4.0, 9.0], "rope_theta": 10000.0}
NESTED = {"full_attention": {**LONG, "original_max_position_embeddings": ORIGINAL, "factor": 8.0}}
NESTED |= {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
TYPES = ["full_attention", "sliding_attention"]
KINDS = {
    "longrope": lambda: Phi3ForCausalLM(
        Phi3Config(**COMMON, rope_parameters=LONG, original_max_position_embeddings=ORIGINAL)
    ),
    "longrope of some layers": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**COMMON, head_dim=4, num_key_value_heads=2, layer_types=TYPES, rope_parameters=NESTED)
    ),
    "dynamic": lambda: LlamaForCausalLM(
        LlamaConfig(**COMMON | {"max_position_embeddings": ORIGINAL}, rope_parameters=DYNAMIC)
    ),
}


def base_of(kind: str, max_tokens: int = 256) -> BaseModel:
    torch.manual_seed(0)
    model = KINDS[kind]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return BaseModel(model, tokenizer(), kind, max_tokens=max_tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_text_is_scored_the_same_beside_the_longest_text_that_a_base_takes(kind):
    base, short = base_of(kind), random_examples(2, 0)
    tokens = tuple(int(token) for token in torch.randint(3, 259, (base.prompts.max_tokens,)))
    alone = log_likelihood(base, [short], [])[0]
    beside = log_likelihood(base, [short, [Example(tokens, len(tokens) - 3)]], [], tokens_per_batch=2**20)[0]
    torch.testing.assert_close(torch.as_tensor(beside), torch.as_tensor(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_cut_before_rope_changes_its_frequencies(kind):
    assert base_of(kind).prompts.max_tokens == ORIGINAL


def test_a_lower_limit_of_tokens_stays_and_a_higher_one_is_logged(caplog):
    with caplog.at_level(logging.INFO, "mta"):
        assert base_of("longrope", 48).prompts.max_tokens == 48
        assert "RoPE" not in caplog.text
        base_of("longrope", 256)
    assert "at 64 tokens instead of 256" in caplog.text
