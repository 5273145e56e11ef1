"""Lock-step training against one person at a time: the same weights, whoever else is in the cohort."""

import math
import os
import pickle
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import base_of, random_examples, random_loras, unpacked

from mta.config import Training
from mta.lora.batch import LoraBatch, fresh
from mta.lora.layers import Gated, PerPerson, Shared
from mta.model.base import BaseModel
from mta.model.footprint import TextLengths
from mta.training.checkpoint import Checkpoint
from mta.training.trainer import Job, batch_of, train_loras

THREE = Training(lr=1e-2, steps=3, batch_size=3, schedule="cosine", warmup=0.4, weight_decay=0.01)


def jobs_of(*sizes: int) -> list[Job]:
    return [Job(f"person-{n}", random_examples(n, seed=n)) for n in sizes]


def start_of(base, jobs, rank=2) -> LoraBatch:
    return fresh(base.targets, rank, 4.0, 0, [job.key for job in jobs], base.master_dtype)


def difference(one: LoraBatch, other: LoraBatch) -> float:
    return max(float((a - b).abs().max()) for n in one.names for a, b in zip(one.factors[n], other.factors[n]))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma3", "gpt2"])
def test_batched_equals_one_by_one(kind):
    base, jobs = base_of(kind), jobs_of(3, 5, 1, 4)
    together = train_loras(base, jobs, start_of(base, jobs), THREE)
    assert float(together.factors[together.names[0]].b.abs().max()) > 1e-3
    for i, job in enumerate(jobs):
        alone = train_loras(unpacked(base), [job], start_of(base, [job]), THREE)
        assert difference(together.select([i]), alone) < 1e-10


@settings(deadline=None, max_examples=6)
@given(st.permutations([3, 5, 1, 4, 7]), st.integers(1, 5), st.sampled_from([1, 40, 150, 4096]), st.booleans())
def test_results_are_independent_of_cohort_order_rows_and_passes(sizes, mates, budget, packed):
    base = base_of()
    jobs = jobs_of(*sizes[:mates])
    reference = train_loras(base, jobs[:1], start_of(base, jobs[:1]), THREE)
    way = base if packed else unpacked(base)
    found = train_loras(way, jobs, start_of(base, jobs), THREE, tokens_per_batch=budget)
    assert difference(found.select([0]), reference) < 1e-10


@settings(deadline=None, max_examples=8)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from([1, 60, 100, 4096]), st.booleans())
def test_results_over_frozen_merges_are_independent_of_rows_and_passes(sizes, budget, packed):
    """Stage 3: several rows of one person, or of several, and only some of the people in a pass."""
    base = base_of()
    jobs = [Job(f"person-{n}", random_examples(size, seed=n)) for n, size in enumerate(sizes)]
    merges = random_loras(base, len(jobs), rank=3)
    start = start_of(base, jobs, rank=1)
    task, way = Shared(random_loras(base, 1)), base if packed else unpacked(base)
    found = train_loras(way, jobs, start, THREE, frozen=[task, PerPerson(merges)], tokens_per_batch=budget)
    for n, job in enumerate(jobs):
        below = [task, PerPerson(merges.select([n]))]
        assert difference(found.select([n]), train_loras(base, [job], start.select([n]), THREE, frozen=below)) < 1e-10


@pytest.mark.parametrize("size", [8, 3])
def test_equals_torch_with_peft_a_plain_loop(size):
    """Against peft.PeftModel, cross entropy of each example, torch.optim.AdamW, and a schedule written out."""
    import peft

    base, jobs = base_of(), jobs_of(4)
    training = Training(lr=1e-2, steps=5, batch_size=size, clip=0.05, schedule="cosine", warmup=0.4, weight_decay=0.1)
    rates = [0.5e-2, 1e-2, *(1e-2 * (1 + math.cos(math.pi * n / 3)) / 2 for n in range(3))]
    start = start_of(base, jobs)
    ours = train_loras(base, jobs, start, training)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=list(base.targets))
    model = peft.get_peft_model(base_of().model, config).double()
    layers = {name: model.get_submodule(f"base_model.model.{name}") for name in start.names}
    for name, layer in layers.items():
        layer.lora_A["default"].weight.data = start.factors[name].a[0].clone()
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=training.lr, weight_decay=0.1)
    for step, rate in enumerate(rates):
        total, count = 0.0, 0
        for example in batch_of(jobs[0], step, size, seed=0):
            table = model(input_ids=torch.tensor([example.tokens])).logits[0].log_softmax(-1)
            places = torch.arange(example.target_start, len(example.tokens))
            total = total - table[places - 1, torch.tensor(example.target)].sum()
            count += len(places)
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(learnt, training.clip)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    for name, layer in layers.items():
        torch.testing.assert_close(ours.factors[name].a[0], layer.lora_A["default"].weight.data, rtol=0, atol=1e-9)
        torch.testing.assert_close(ours.factors[name].b[0], layer.lora_B["default"].weight.data, rtol=0, atol=1e-9)


def test_frozen_adapters_are_part_of_the_model_and_stay():
    base, jobs = base_of(), jobs_of(3, 2)
    task, bank = random_loras(base, 1, seed=1), random_loras(base, 3, seed=2)
    w = torch.tensor([[0.2, 0.5, 0.0], [0.0, 0.1, 0.9]], dtype=torch.float64)
    before = {n: t.clone() for n, t in bank.tensors().items()}
    together = train_loras(base, jobs, start_of(base, jobs), THREE, frozen=[Shared(task), Gated(bank, w)])
    for i, job in enumerate(jobs):
        alone = train_loras(base, [job], start_of(base, [job]), THREE, frozen=[Shared(task), Gated(bank, w[i : i + 1])])
        assert difference(together.select([i]), alone) < 1e-10
    assert all(torch.equal(before[n], t) for n, t in bank.tensors().items())


def test_a_finished_person_is_not_trained_further():
    base, jobs = base_of(), jobs_of(2, 9)
    training = Training(lr=1e-2, epochs=1, batch_size=2)
    assert [training.steps_for(2), training.steps_for(9)] == [1, 5]
    steps = []
    together = train_loras(base, jobs, start_of(base, jobs), training, on_step=steps.append)
    assert steps[-1].examples == steps[-1].examples_total == training.examples(2) + training.examples(9) == 12
    alone = train_loras(base, jobs[:1], start_of(base, jobs[:1]), training)
    assert difference(together.select([0]), alone) < 1e-10


@pytest.mark.parametrize("blocks", [(), range(7), (5, 2, 2, 5, 0, 2, 0)])
def test_batches_use_every_example_before_repeating_and_keep_blocks_together(blocks):
    job = replace(jobs_of(7)[0], blocks=blocks)
    seen = [example for step in range(7) for example in batch_of(job, step, 3, seed=0)]
    assert len(seen) == 21
    for epoch in range(3):
        assert sorted(e.tokens for e in seen[epoch * 7 : epoch * 7 + 7]) == sorted(e.tokens for e in job.examples)
        order = [blocks[job.examples.index(e)] for e in seen[epoch * 7 : epoch * 7 + 7]] if blocks else []
        assert sum(a != b for a, b in pairwise(order)) == max(len(set(blocks)) - 1, 0)


@pytest.mark.parametrize("stop_at", [1, 3, 6])
def test_interrupted_and_resumed_gives_the_same_bits(tmp_path, stop_at):
    base, jobs = base_of(), jobs_of(2, 5, 9)
    training = Training(lr=1e-2, epochs=3, batch_size=3)

    def run(checkpoint=None, on_step=None):
        return train_loras(base, jobs, start_of(base, jobs), training, checkpoint=checkpoint, on_step=on_step)

    def stop(step):
        if step.step == stop_at:
            raise KeyboardInterrupt

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(Checkpoint(tmp_path / "c", "work", every=0.0), stop)
    steps = []
    resumed = run(Checkpoint(tmp_path / "c", "work", every=0.0), lambda step: steps.append(step.step))
    assert steps[0] == max(stop_at, 1)  # the interrupted step had not been saved
    assert difference(whole, resumed) == 0.0


def test_a_checkpoint_of_other_work_or_cut_short_is_not_used(tmp_path):
    path = tmp_path / "c"
    Checkpoint(path, "one").save({"x": torch.zeros(3)}, {"step": 1})
    assert Checkpoint(path, "two").load() is None
    assert Checkpoint(path, "one").load() is not None
    path.write_bytes(path.read_bytes()[:-5])
    assert Checkpoint(path, "one").load() is None
    path.write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    assert Checkpoint(path, "one").load() is None
    assert not (tmp_path / "ran").exists()


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_float32_gradients_of_the_first_step_are_independent_of_the_cohort():
    """What float32 can promise: after one plain step the same within 1e-3."""
    base = base_of(dtype=torch.float32)
    jobs = jobs_of(3, 5, 1, 4)
    training = Training(lr=1e6, steps=1, batch_size=8, eps=1e6, clip=1e9)  # a step by the gradient
    start = random_loras(base, 4)
    together = train_loras(base, jobs, start, training)
    for i, job in enumerate(jobs):
        alone = train_loras(unpacked(base), [job], start.select([i]), training)
        for name in start.names:
            for now, then, first in zip(together.factors[name], alone.factors[name], start.factors[name]):
                change, reference = now[i] - first[i], then[0] - first[i]
                assert float(reference.norm()) > 0
                assert float((change - reference).norm()) <= 1e-3 * float(reference.norm())


@settings(max_examples=8, deadline=None)
@given(parts=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_a_stack_that_is_updated_often_is_no_larger_than_that_of_the_whole_history(parts):
    base, training = base_of(), Training(lr=0.3, steps=1, batch_size=64, lr_shrink_examples=8, clip=1e9)
    examples, known, found = random_examples(sum(parts), seed=1), 0, None
    for n in parts:
        job = Job("a", examples[known : known + n], known)
        found = train_loras(base, [job], found or start_of(base, [job], rank=1), training)
        known += n
    largest = max(float(b.abs().max()) for _, b in found.factors.values())
    assert largest <= 0.3 * known / (known + 8) * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_gradient_checkpointing_recomputes_layers_with_equal_results(kind):
    base, jobs = base_of(kind), jobs_of(3, 2)
    again = BaseModel(base_of(kind).model, base.tokenizer, kind, gradient_checkpointing=True)
    calls = []
    again.model.get_submodule(next(iter(again.targets))).register_forward_hook(lambda *_: calls.append(1))
    found = train_loras(again, jobs, start_of(again, jobs), THREE)
    assert len(calls) == 2 * THREE.steps
    assert difference(found, train_loras(base, jobs, start_of(base, jobs), THREE)) < 1e-10
    assert again.footprint.token(TextLengths(100)) < base.footprint.token(TextLengths(100))


@pytest.mark.parametrize("packed", [True, False])
def test_gradient_checkpointing_takes_merges_and_people_with_different_numbers_of_rows(packed):
    base, jobs = base_of(), jobs_of(3, 2)
    again = BaseModel(base_of().model, base.tokenizer, "tiny", gradient_checkpointing=True)
    w = torch.rand(2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    frozen = [Gated(random_loras(base, 4), w)]
    found, expected = (
        train_loras(one if packed else unpacked(one), jobs, start_of(one, jobs), THREE, frozen=frozen)
        for one in (again, base)
    )
    assert difference(found, expected) < 1e-10
