"""Decoding rows of different people together: everybody answers as if they were alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import base_of, changed_json, endless, greedy, random_loras, save_base

from mta.lora.layers import PerPerson, applied
from mta.model.base import BaseModel
from mta.model.generate import generate

KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2"]


def prompts_of(*lengths):
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 259, (length,), generator=draw).tolist() for length in lengths]


def people(base, count=3):
    return [PerPerson(random_loras(base, count, size=0.6))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_different_people_answers_like_each_alone_without_padding(kind):
    """Long enough for the sliding windows of 5 tokens to matter; -1 is nobody."""
    base = endless(base_of(kind))
    prompts, owners, adapters = prompts_of(9, 3, 14, 7), [2, 0, -1, 1], people(base)
    found = generate(base, prompts, owners, adapters, max_new_tokens=6)
    assert found == [greedy(base, prompt, owner, adapters, 6) for prompt, owner in zip(prompts, owners)]


@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_the_batch_size_does_not_change_answers(budget):
    base = endless(base_of())
    prompts, owners, adapters = prompts_of(5, 11, 2, 8), [0, 1, 2, 0], people(base)
    how = {"max_new_tokens": 5}
    assert generate(base, prompts, owners, adapters, tokens_per_batch=budget, **how) == generate(
        base, prompts, owners, adapters, **how
    )


def test_an_answer_ends_before_its_end_token_while_others_go_on():
    base = endless(base_of())
    prompts, owners, adapters = prompts_of(6, 9), [0, 1], people(base)
    first, second = generate(base, prompts, owners, adapters, max_new_tokens=8)
    end = next(token for token in first[1:] if token not in second)
    base.model.generation_config.eos_token_id = end
    assert generate(base, prompts, owners, adapters, max_new_tokens=8) == [first[: first.index(end)], second]


def test_the_templates_end_token_ends_an_answer_too():
    base = endless(base_of())
    whole = generate(base, prompts_of(6), [-1], [], max_new_tokens=8)[0]
    base.prompts.end_token = whole[3]
    assert generate(base, prompts_of(6), [-1], [], max_new_tokens=8)[0] == whole[: whole.index(whole[3])]


def test_the_padding_token_in_a_prompt_is_text_like_any_other():
    base = endless(base_of())
    prompts = [[base.pad_token, 5, base.pad_token, 7], [8, 9, 10, 11, 12, 13]]
    assert generate(base, prompts, [-1, -1], [], max_new_tokens=4) == [
        greedy(base, prompt, -1, [], 4) for prompt in prompts
    ]


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_generating_does_not_change_the_callers_random_state(temperature):
    base = endless(base_of())
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    generate(base, prompts_of(6), [0], people(base, 1), max_new_tokens=4, temperature=temperature, seed=7)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("temperature", [1, 3.0])
def test_tokens_are_drawn_with_the_probabilities_of_the_model(temperature):
    base, count = endless(base_of()), 5_000
    (prompt,), adapters = prompts_of(6), people(base, 1)
    found = generate(base, [prompt] * count, [0] * count, adapters, max_new_tokens=1, temperature=temperature)
    with torch.no_grad(), applied(base.model, adapters, torch.tensor([0])):
        expected = (base.model(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    (stop,) = base.stop_tokens
    tokens = torch.tensor([answer[0] if answer else stop for answer in found])
    shares = torch.bincount(tokens, minlength=len(expected)) / count
    assert float((shares - expected).abs().sum()) < 2 * float((expected * (1 - expected) / count).sqrt().sum())


def test_threads_draw_what_they_would_draw_alone():
    base = endless(base_of())
    bases = [base, *(base.twin() for _ in range(3))]

    def drawn(seed):
        return generate(bases[seed], prompts_of(6), [0], people(base, 1), max_new_tokens=12, temperature=2.0, seed=seed)

    alone = [drawn(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(drawn, range(4))) == alone


def test_decoding_ignores_the_sampling_settings_of_the_base(tmp_path):
    """Answers and scores come from the same model: no penalty, no filter (decision 012)."""
    folder = save_base(tmp_path / "base")
    plain = endless(BaseModel.load(str(folder)))
    changed_json(folder / "generation_config.json", repetition_penalty=5.0, top_k=1, temperature=0.1)
    odd = endless(BaseModel.load(str(folder)))
    for temperature in (0.0, 2.0):
        found, expected = (
            generate(base, prompts_of(6, 4), [0, 1], people(base), max_new_tokens=12, temperature=temperature)
            for base in (odd, plain)
        )
        assert found == expected
