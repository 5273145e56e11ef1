"""Every causal language model of transformers: rows as computed give what the model gives alone, or it is refused."""

import architectures
import plain
import pytest
import torch
from architectures import base_of
from tiny import random_examples, random_loras, unpacked
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ALL

from mta.errors import UnsupportedModel
from mta.lora.batch import Factors, LoraBatch
from mta.lora.layers import PerPerson, applied
from mta.model.generate import generate
from mta.personalize.adapters import TASK
from mta.serving.embedded.engine import EmbeddedEngine
from mta.serving.embedded.kv_cache import Slots, refuse_unservable
from mta.training.packing import collate, pack
from mta.training.scoring import log_likelihood

FAST = {
    "llama": "blocks",
    "mistral": "blocks",  # sliding windows
    "gemma3": "blocks",  # the model that reads images too
    "llama4": "blocks",  # chunks
    "mixtral": "blocks",  # experts
    "stablelm": "masks",
    "lfm2": "alone",  # convolutions
    "minimax": "alone",  # lightning attention
    "bart": "alone",  # no positions
    "mamba": "refused",
    "bert": "refused",  # sees what follows
}
NOT_BUILT = {
    "blt": "a vocabulary of three million hashes",
    "git": "its image tower is not small",
    "got_ocr2": "its image tower is not small",
    "moss_transcribe_diarize": "its audio tower is not small",
    "phi4_multimodal": "its towers are not small",
}
REST = [pytest.param(kind, marks=pytest.mark.slow) for kind in ALL if kind not in FAST]


def changed(base, update):
    return plain.weights(base, {name: x.mT if base.fan_in_fan_out else x for name, x in update.items()})


def way_of(base):
    if base is None:
        return "refused"
    return "blocks" if base.blocked else "masks" if base.packable else "alone"


def gradients(base, jobs, loras):
    """Of the summed log-likelihood, each person's examples with their own adapter."""
    rows = [(u, row) for u, job in enumerate(jobs) for row in pack(job, 0.0, budget=2048 if base.packable else 0)]
    batch = collate([row for _, row in rows], base.pad_token, base.device)
    factors = {name: Factors(*(x.clone().requires_grad_() for x in pair)) for name, pair in loras.factors.items()}
    with applied(base.model, [PerPerson(LoraBatch(factors, loras.scale))], torch.tensor([u for u, _ in rows])):
        logits = batch.logits(base)
        batch.log_probs(logits).sum().backward()
    return {name: [torch.zeros_like(x) if x.grad is None else x.grad for x in pair] for name, pair in factors.items()}


def plain_gradients(base, job, loras, u):
    leaves = {name: [x[u].clone().requires_grad_() for x in pair] for name, pair in loras.factors.items()}
    weights = changed(base, {name: loras.scale * b @ a for name, (a, b) in leaves.items()})
    sum(plain.log_likelihood(base, weights, example) for example in job).backward()
    return {name: [torch.zeros_like(x) if x.grad is None else x.grad for x in pair] for name, pair in leaves.items()}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, check_dtype=False)  # norms go through float32


def served(base, prompts, width=7):
    """From slots of a cache, a chunk at a time, rows have the logits of whole texts; or the base is not served."""
    try:
        refuse_unservable(base)
    except UnsupportedModel:
        return
    slots = Slots(base, 2, 64, width)
    for number, prompt in enumerate(prompts):
        slots.take((TASK, str(number)), prompt)
    for start in range(0, min(map(len, prompts)), width):
        parts = [prompt[start : start + width] for prompt in prompts]
        found = slots.logits(slice(0, 2), parts)
        for row, prompt in zip(found, prompts):
            with torch.no_grad():
                close(row, base.model(input_ids=torch.tensor([prompt[: start + width]])).logits[0, -1])


def built(kind):
    if kind in NOT_BUILT:
        pytest.skip(NOT_BUILT[kind])
    try:
        return base_of(kind)
    except UnsupportedModel:
        return None
    except Exception as error:  # of transformers, about a configuration that was made small
        if kind in FAST:
            raise
        pytest.skip(f"transformers does not build it this small: {error}")


@pytest.mark.parametrize("kind", [*FAST, *REST])
def test_packed_rows_equal_single_texts_or_the_architecture_is_refused(kind):
    base = built(kind)
    assert way_of(base) == FAST.get(kind, way_of(base))
    if base is None:
        return
    # Examples of two people that are longer than the windows, chunks and convolutions, and an adapter for each.
    jobs = [random_examples(n, seed=n, prefix=9, longest=30) for n in (3, 2)]
    loras = random_loras(base, 2, size=0.1)
    for way in (base, unpacked(base)) if base.packable else (base,):
        found = log_likelihood(way, jobs, [PerPerson(loras)])
        trained = gradients(way, jobs, loras)
        for u, job in enumerate(jobs):
            weights = changed(base, plain.update(loras, u))
            with torch.no_grad():
                close(found[u], torch.stack([plain.log_likelihood(base, weights, example) for example in job]))
            for name, pair in plain_gradients(base, job, loras, u).items():
                for ours, theirs in zip(trained[name], pair):
                    close(ours[u], theirs)
    served(base, [example.prompt for example in jobs[0][:2]])
    prompts = [example.prompt for job in jobs for example in job]
    together = generate(base, prompts, [-1] * len(prompts), [], max_new_tokens=3)
    assert together == [generate(base, [prompt], [-1], [], max_new_tokens=3)[0] for prompt in prompts]


@pytest.mark.parametrize("kind", ["lfm2", "minimax", "bart"])
def test_a_base_without_a_reusable_cache_is_not_served(kind):
    with pytest.raises(UnsupportedModel, match=f"embedded engine cannot serve 'tiny-{kind}'") as caught:
        EmbeddedEngine(base_of(kind), None, None)
    assert "vLLM" in caught.value.hint


@pytest.mark.parametrize("kind", ["llama", "gemma3", "bart"])  # gemma3 and bart have towers that no text goes through
def test_memory_is_planned_for_the_adapted_layers_only(kind):
    base = base_of(kind)
    sums, shapes = base.footprint.sums, base.targets.values()
    expected = (len(shapes), sum(o for _, o in shapes), sum(d + o for d, o in shapes))
    assert (sums.adapted, sums.outputs, sums.width) == expected


@pytest.mark.parametrize("window", [5, 64])
@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "cohere2", "llama4_text"])
def test_long_attention_windows_are_packed_unchanged(kind, window, monkeypatch):
    for name in ("sliding_window", "attention_chunk_size"):
        monkeypatch.setitem(architectures.SIZES, name, window)
    base = base_of(kind)
    assert base.blocked
    assert window in (vars(base.model.config).get(name) for name in ("sliding_window", "attention_chunk_size"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [kind for kind, way in FAST.items() if way != "refused"])
def test_low_precision_chooses_the_same_way_as_float64(kind, dtype):
    assert way_of(base_of(kind, dtype)) == FAST[kind]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_bidirectional_model_is_refused_in_low_precision(dtype):
    with pytest.raises(UnsupportedModel, match="gives a text other logits in a batch than alone"):
        base_of("bert", dtype)
