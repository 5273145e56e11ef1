"""What passes are planned to take against the tensors that they really hold."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from memory import TensorMemory
from tiny import random_loras, tokenizer, without_kernels
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mta.config import Training
from mta.data.tasks.prompt import Example
from mta.lora.batch import fresh
from mta.lora.layers import Gated, PerPerson, Shared
from mta.model.adaptable import adapted_layers
from mta.model.agreement import called_layers
from mta.model.base import BaseModel
from mta.model.footprint import LayerTotals, ParameterCounts, TextLengths
from mta.training.gates import gate_gradients
from mta.training.packing import pack
from mta.training.plan import plan_cohorts
from mta.training.scoring import log_likelihood
from mta.training.trainer import Job, train_loras

ONE_STEP = Training(steps=1, batch_size=64)
LARGE = 2**16  # tokens of a vocabulary
COMMON = {"num_hidden_layers": 3, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1}
COMMON |= {"eos_token_id": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
FINE = {"vocab_size": 300, "hidden_size": 128, "head_dim": 64, "moe_intermediate_size": 96}
FINE |= {"num_experts": 16, "num_experts_per_tok": 4}
SHAPES = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=192, intermediate_size=512, head_dim=48, **COMMON)
    ),
    "large vocabulary": lambda: LlamaForCausalLM(
        LlamaConfig(vocab_size=LARGE, hidden_size=64, intermediate_size=160, **COMMON)
    ),
    "bounded logits": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=LARGE, hidden_size=64, intermediate_size=160, head_dim=16, final_logit_softcapping=30.0, **COMMON
        )
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(vocab_size=5000, hidden_size=128, intermediate_size=256, head_dim=64, **COMMON)
    ),
    "phi3": lambda: Phi3ForCausalLM(
        Phi3Config(vocab_size=300, hidden_size=192, intermediate_size=256, **COMMON | {"num_key_value_heads": 4})
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_embd=192, n_layer=3, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(vocab_size=300, hidden_size=192, intermediate_size=512, num_local_experts=4, **COMMON)
    ),
    "qwen3 moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**FINE, **COMMON)),
}


def base_of(shape: str, dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> BaseModel:
    torch.manual_seed(0)
    return BaseModel(SHAPES[shape]().to(dtype), tokenizer(), shape, gradient_checkpointing=checkpointing)


def jobs_of(people: int, examples: int = 5, prefix: int = 60, own: int = 24, targets: int = 6) -> list[Job]:
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 259, (count,), generator=draw).tolist())

    def job(name: str) -> Job:
        head = tokens(prefix)
        return Job(name, [Example(head + tokens(own + targets), prefix + own) for _ in range(examples)])

    return [job(f"person-{n}") for n in range(people)]


def sizes(base: BaseModel, jobs: list[Job]) -> tuple[int, int, int, TextLengths]:
    """Padded tokens, places that need logits, people, and lengths, where all jobs go through the base together."""
    rows = [row for job in jobs for row in pack(job.examples, base.attention_price, blocked=base.blocked)]
    texts = TextLengths(len(jobs[0].examples[0].tokens) - 1, jobs[0].examples[0].target_start - 24)
    return len(rows) * max(len(row.tokens) for row in rows), sum(row.logit_count for row in rows), len(jobs), texts


def held(base: BaseModel, *batches: object) -> list[torch.Tensor]:
    """Tensors that were there before: weights and adapters."""
    factors = [factor for batch in batches for pair in batch.factors.values() for factor in pair]
    return [*base.model.parameters(), *base.model.buffers(), *factors]


def test_keys_and_values_are_counted_whatever_the_order_of_the_layers():
    """Phi-3 defines its output projection first."""
    sums = base_of("phi3").footprint.sums
    assert (sums.queries, sums.keys) == (3 * 192, 3 * 2 * 192)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "below"),
    [
        ("llama", "merge"),
        ("llama", "gates"),
        ("large vocabulary", "task"),
        ("bounded logits", "task"),
        ("qwen3", "merge"),
        ("gpt2", "none"),
    ],
)
def test_training_and_scoring_passes_take_the_planned_memory(shape, below, dtype):
    compiled = (below == "merge") == (dtype == torch.float32)  # each kind of adapters with kernels and without
    with nullcontext() if compiled else without_kernels():
        base, jobs = base_of(shape, dtype), jobs_of(3)
        width = sum(d + o for d, o in base.targets.values())
        task, merges, bank = (random_loras(base, n, r).to(dtype) for n, r in ((1, 8), (len(jobs), 6), (5, 4)))
        gates = torch.rand(len(jobs), len(bank)).to(dtype)
        frozen, numbers = {
            "none": ([], ParameterCounts(width)),
            "task": ([Shared(task)], ParameterCounts(width, task_lora=8 * width)),
            "merge": ([Shared(task), PerPerson(merges)], ParameterCounts(width, task_lora=8 * width, frozen=6 * width)),
            "gates": (
                [Shared(task), Gated(bank, gates)],
                ParameterCounts(width, task_lora=8 * width, shared=20 * width),
            ),
        }[below]
        start, stacks = fresh(base.targets, 1, 1.0, 0, [job.key for job in jobs]), random_loras(base, len(jobs), 1)
        known = held(base, task, merges, bank, stacks := stacks.to(dtype))
        with TensorMemory(known) as training:
            train_loras(base, jobs, start, ONE_STEP, frozen=frozen, tokens_per_batch=2**20)
        with TensorMemory(known) as scoring:
            log_likelihood(base, [job.examples for job in jobs], [*frozen, PerPerson(stacks)], tokens_per_batch=2**20)
    planned = base.footprint.training(*sizes(base, jobs), numbers) + 4 * 4 * width * len(jobs)  # AdamW's buffers
    assert training.peak == pytest.approx(planned, rel=0.15)
    assert scoring.peak == pytest.approx(base.footprint.scoring(*sizes(base, jobs), numbers), rel=0.15)


@pytest.mark.parametrize(("shape", "dtype"), [("llama", torch.float32), ("qwen3", torch.bfloat16)])
def test_a_pass_with_gradients_of_gates_takes_the_planned_memory(shape, dtype):
    base, jobs = base_of(shape, dtype), jobs_of(3)
    width, (tokens, targets, people, texts) = sum(d + o for d, o in base.targets.values()), sizes(base, jobs)
    bank, mu = random_loras(base, 16, 4).to(dtype), torch.zeros(16)
    with TensorMemory(held(base, bank)) as found:
        gate_gradients(base, jobs, bank, mu, [], tokens_per_batch=2**20)
    numbers = ParameterCounts(shared=64 * width, gated=64 * width)
    planned = base.footprint.training(tokens, targets, people, texts, numbers)
    planned += tokens * (base.footprint.gate_token(texts, numbers) - base.footprint.token(texts))
    assert found.peak == pytest.approx(planned, rel=0.15)


@pytest.mark.parametrize(("shape", "compiled"), [("mixtral", True), ("qwen3 moe", True), ("qwen3 moe", False)])
def test_passes_through_a_mixture_of_experts_take_the_planned_memory(shape, compiled):
    with nullcontext() if compiled else without_kernels():
        base, jobs = base_of(shape), jobs_of(3)
        width, stacks = sum(d + o for d, o in base.targets.values()), random_loras(base, len(jobs), 1)
        start = fresh(base.targets, 1, 1.0, 0, [job.key for job in jobs])
        with TensorMemory(held(base, stacks)) as training:
            train_loras(base, jobs, start, ONE_STEP, tokens_per_batch=2**20)
        with TensorMemory(held(base, stacks)) as scoring:
            log_likelihood(base, [job.examples for job in jobs], [PerPerson(stacks)], tokens_per_batch=2**20)
    planned = base.footprint.training(*sizes(base, jobs), ParameterCounts(width)) + 4 * 4 * width * len(jobs)
    assert training.peak == pytest.approx(planned, rel=0.15)
    assert scoring.peak == pytest.approx(base.footprint.scoring(*sizes(base, jobs), ParameterCounts(width)), rel=0.15)


def test_the_experts_of_a_token_are_counted_whatever_the_base_calls_their_number():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "global_head_dim": 16, "vocab_size": 300}
    moe = {"enable_moe_block": True, "num_experts": 16, "top_k_experts": 4, "moe_intermediate_size": 32}
    model = Gemma4ForCausalLM(Gemma4TextConfig(**sizes, **moe, **COMMON, hidden_size_per_layer_input=0))
    layers = adapted_layers(model, called_layers(model), "gemma4")
    assert LayerTotals.of(model, layers).routed == 3 * 4 * 64  # layers, experts of a token, inputs


def test_norms_beside_the_layers_of_text_are_counted_and_those_of_other_towers_are_not():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "global_head_dim": 16, "vocab_size": 300}
    text = Gemma4ForCausalLM(Gemma4TextConfig(**sizes, **COMMON, hidden_size_per_layer_input=8))
    both = torch.nn.ModuleDict({"text": text.model, "images": torch.nn.Sequential(torch.nn.LayerNorm(512))})
    both.config = text.config
    layers = adapted_layers(text, called_layers(text), "gemma4")
    named = {name.replace("model.", "text.", 1): shape for name, shape in layers.items()}
    assert LayerTotals.of(both, named) == LayerTotals.of(text, layers)
    assert any("per_layer_model_projection" in name for name in named)


def test_gradient_checkpointing_takes_the_planned_memory():
    base, jobs = base_of("llama", checkpointing=True), jobs_of(3)
    width = sum(d + o for d, o in base.targets.values())
    with TensorMemory(held(base)) as training:
        train_loras(base, jobs, fresh(base.targets, 1, 1.0, 0, ["a"] * 3), ONE_STEP, tokens_per_batch=2**20)
    planned = base.footprint.training(*sizes(base, jobs), ParameterCounts(width)) + 4 * 4 * width * len(jobs)
    assert training.peak == pytest.approx(planned, rel=0.15)


def test_training_and_scoring_over_a_large_vocabulary_stay_within_the_memory():
    """Most of what these passes take is logits."""
    base, jobs = base_of("large vocabulary"), jobs_of(4, targets=16)
    width, budget = sum(d + o for d, o in base.targets.values()), 40 * 2**20
    task = random_loras(base, 1, 8)
    plan = plan_cohorts(base, jobs, width, budget, below=ParameterCounts(task_lora=8 * width))
    with TensorMemory(held(base, task)) as used:
        for cohort in plan.cohorts:
            some = [jobs[n] for n in cohort]
            start = fresh(base.targets, 1, 1.0, 0, [job.key for job in some])
            how = {"frozen": [Shared(task)], "tokens_per_batch": plan.tokens_per_batch}
            train_loras(base, some, start, ONE_STEP, **how)
        log_likelihood(base, [job.examples for job in jobs], [Shared(task)], tokens_per_batch=plan.tokens_per_batch)
    assert used.peak <= budget


@pytest.mark.parametrize(("shape", "memory"), [("llama", 12), ("large vocabulary", 12), ("large vocabulary", 40)])
def test_scoring_for_which_nothing_was_planned_takes_at_most_half_of_the_memory(shape, memory):
    base, jobs = base_of(shape), jobs_of(12, targets=8)
    examples = [job.examples for job in jobs]
    with TensorMemory(held(base)) as used:
        found = log_likelihood(base, examples, memory=memory * 2**20)
    assert used.peak <= memory * 2**19
    for one, other in zip(found, log_likelihood(base, examples), strict=True):
        torch.testing.assert_close(one, other)


def test_memory_is_planned_for_where_workers_compute():
    """Here with kernels; GPUs have none, and take larger passes."""
    here, there = base_of("llama", torch.bfloat16), base_of("llama", torch.bfloat16)
    jobs = jobs_of(40)
    with without_kernels():
        there.exchanged = []
        assert there.footprint == here.footprint_without_kernels
        for_gpus = plan_cohorts(there, jobs, 10_000, 40 * 2**20, on_gpu=True)
    found = plan_cohorts(here, jobs, 10_000, 40 * 2**20, on_gpu=True)
    assert found == for_gpus
    assert plan_cohorts(here, jobs, 10_000, 2**40, on_gpu=True).tokens_per_batch > 7 * 4096
    assert plan_cohorts(here, jobs, 10_000, 2**40).tokens_per_batch < 2 * 4096


@pytest.mark.parametrize("memory", [12, 48])
def test_rows_of_one_example_and_their_copies_of_a_merge_stay_within_the_memory(memory):
    """People with different numbers of examples get a copy of their adapters for each row."""
    base, jobs = base_of("llama"), jobs_of(12, prefix=4, own=4, targets=2)
    base.packable = base.blocked = False
    jobs[3] = replace(jobs[3], examples=jobs[3].examples[1:])
    width, budget = sum(d + o for d, o in base.targets.values()), memory * 2**20
    task, merges = random_loras(base, 1, 8), random_loras(base, len(jobs), 16)
    plan = plan_cohorts(base, jobs, width, budget, below=ParameterCounts(task_lora=8 * width, frozen=16 * width))
    with TensorMemory(held(base, task, merges)) as used:
        for cohort in plan.cohorts:
            some = [jobs[n] for n in cohort]
            start = fresh(base.targets, 1, 1.0, 0, [job.key for job in some])
            frozen = [Shared(task), PerPerson(merges.select(list(cohort)))]
            train_loras(base, some, start, ONE_STEP, frozen=frozen, tokens_per_batch=plan.tokens_per_batch)
    assert used.peak <= budget


def test_the_number_of_targets_per_block_does_not_change_results():
    base, jobs = base_of("large vocabulary", torch.float64), jobs_of(2, targets=8)
    start = fresh(base.targets, 1, 1.0, 0, ["a", "b"], torch.float64)
    found, expected = (train_loras(base, jobs, start, ONE_STEP, tokens_per_batch=tokens) for tokens in (10, 1_000_000))
    for name, tensor in found.tensors().items():
        torch.testing.assert_close(tensor, expected.tensors()[name], rtol=0, atol=1e-10)
