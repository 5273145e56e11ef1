"""The frozen base: what LoRA attaches to, whose weights they are, and what is refused."""

import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import architectures
import pytest
import torch
from huggingface_hub import constants
from tiny import KINDS, base_of, changed_json, new_base, save_base, tokenizer
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from mta.config import Run
from mta.data.history import Item
from mta.data.tasks import load_task
from mta.errors import AssetError, ModelError, UnsupportedModel
from mta.model.base import BaseModel, corrected
from mta.model.fingerprint import fingerprint_of
from mta.model.generate import generate

SMOLLM2 = "631823ecce74fbc7b4ddb672183c5585efbf77b71e0824146af73e341dd72b6c"  # of the converted asset
ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
GPT2 = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def load(folder) -> BaseModel:
    return BaseModel.load(str(folder), "float32", "cpu")


def refused(folder, kind=ModelError) -> str:
    with pytest.raises(kind) as caught:
        load(folder)
    return str(caught.value)


# what LoRA attaches to


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_layers_but_the_head_are_targets(kind):
    base = base_of(kind)
    wanted, stem = (GPT2, "transformer.h") if kind == "gpt2" else (ATTENTION | MLP, "model.layers")
    assert set(base.targets) == {f"{stem}.{layer}.{name}" for layer in range(2) for name in wanted}


def test_a_base_has_no_trainable_parameters():
    base = base_of()
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


# loading


def test_a_local_folder_loads_and_computes_as_before(saved):
    tokens = torch.tensor([[5, 6, 7]])
    before, after = base_of("llama", torch.float32).model, load(saved).model
    torch.testing.assert_close(after(input_ids=tokens).logits, before(input_ids=tokens).logits)


def test_prompts_are_at_most_as_long_as_the_models_context(saved):
    assert load(saved).prompts.max_tokens == 512
    assert BaseModel.load(str(saved), "float32", "cpu", max_tokens=100).prompts.max_tokens == 100


def test_the_name_of_an_asset_stays_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2-135m-instruct", "all-minilm-l6-v2"):
        (tmp_path / name).mkdir()
    base = base_of()
    run = BaseModel(base.model, base.tokenizer, "smollm2-135m-instruct").as_loaded(Run(encoder="all-minilm-l6-v2"))
    assert (run.base, run.encoder) == ("smollm2-135m-instruct", "all-minilm-l6-v2")


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
def test_weights_load_in_the_dtype_asked_for(saved, name):
    base = BaseModel.load(str(saved), name, "cpu")
    assert base.dtype == getattr(torch, name)
    assert base.master_dtype == (torch.float64 if name == "float64" else torch.float32)


# what cannot be loaded


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert "cannot be loaded as a causal language model" in refused(tmp_path)


@pytest.mark.parametrize("name", ["nobody/nothing", "smollm2"])
def test_an_unknown_name_without_a_network_is_reported_as_neither_folder_nor_asset(name, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError) as caught:
        load(name)
    assert f"{name!r} is neither an asset (smollm2-135m-instruct, " in caught.value.message
    assert "give the folder" in caught.value.hint


def test_weights_that_were_cut_short_are_refused(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded as a causal language model" in refused(copy)


def test_missing_weights_are_refused(copy):
    changed_json(copy / "config.json", num_hidden_layers=3)
    message = refused(copy)
    assert "9 weights are not in its files, model.layers.2.input_layernorm.weight first" in message


def test_pickled_weights_are_not_read(copy):
    torch.save(base_of().model.state_dict(), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert "cannot be loaded as a causal language model" in refused(copy)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_a_quantized_folder_is_refused_before_its_weights_are_read(copy, method):
    (copy / "model.safetensors").unlink()
    changed_json(copy / "config.json", quantization_config={"quant_method": method, "bits": 4})
    message = refused(copy, UnsupportedModel)
    assert f"'llama' is quantized by {method}; adapters are trained over plain weights, or" in message


@pytest.mark.parametrize("of_text", [False, True])
def test_a_quantized_model_is_refused(of_text):
    model = KINDS["llama"]()
    part = SimpleNamespace(quantization_config={"quant_method": "gptq"})
    if of_text:
        model.config.get_text_config = lambda **_: part
    else:
        model.config.quantization_config = part.quantization_config
    with pytest.raises(UnsupportedModel, match="is quantized"):
        BaseModel(model, tokenizer(), "tiny")


def test_weights_in_half_precision_are_refused():
    with pytest.raises(ModelError, match=r"weights are torch\.float16"):
        BaseModel(KINDS["llama"]().half(), tokenizer(), "half")


def test_a_recurrent_model_is_refused():
    model = MambaForCausalLM(MambaConfig(vocab_size=260, hidden_size=8, state_size=4, num_hidden_layers=1))
    with pytest.raises(UnsupportedModel, match="'mamba' carries a recurrent state"):
        BaseModel(model, tokenizer(), "tiny")


def test_a_model_without_gradient_checkpointing_is_refused_when_it_is_needed():
    model = base_of("llama").model
    model.supports_gradient_checkpointing = False
    with pytest.raises(UnsupportedModel, match="'tiny' has no gradient checkpointing"):
        BaseModel(model, tokenizer(), "tiny", gradient_checkpointing=True)


def test_a_model_without_plain_linear_layers_is_refused():
    class Packed(nn.Linear):
        """A linear layer that stores its weights in a way of its own."""

    model = KINDS["llama"]()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Packed
    with pytest.raises(UnsupportedModel, match=r"has no plain linear layers to adapt; its modules are .*Packed"):
        BaseModel(model, tokenizer(), "tiny")


def test_what_is_exchanged_on_a_model_is_part_of_the_check(monkeypatch, caplog):
    def spoiled(model):
        model.model.layers[0].mlp.act_fn = nn.ReLU()
        return ["LlamaMLP"]

    monkeypatch.setattr("mta.model.base.use_kernels", spoiled)
    with (
        caplog.at_level(logging.INFO, "mta"),
        pytest.raises(UnsupportedModel, match="'tiny-llama' gives a text other logits in a batch than alone"),
    ):
        new_base()
    assert re.search(r"leak 0, allowed \S+; difference 0\.\d+, allowed \S+e-0\d", caplog.text)


# whose weights they are


def test_the_fingerprint_does_not_depend_on_the_dtype_weights_load_in(saved):
    assert BaseModel.load(str(saved), "bfloat16", "cpu").fingerprint == load(saved).fingerprint


def test_the_fingerprint_does_not_depend_on_the_configuration(saved, copy):
    changed_json(copy / "config.json", bos_token_id=7)
    assert load(copy).fingerprint == load(saved).fingerprint


def test_one_changed_byte_of_the_weights_changes_the_fingerprint(saved, copy):
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert load(copy).fingerprint != load(saved).fingerprint


def test_another_chat_template_changes_the_fingerprint(saved, copy):
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert load(copy).fingerprint != load(saved).fingerprint


def test_another_vocabulary_changes_the_fingerprint(saved, copy):
    other = tokenizer().from_pretrained(saved)
    other.add_tokens(["<|more|>"])
    other.save_pretrained(copy)
    assert load(copy).fingerprint != load(saved).fingerprint


def test_another_way_to_split_text_changes_the_fingerprint(saved, copy):
    changed_json(copy / "tokenizer.json", normalizer={"type": "Lowercase"})
    assert load(copy).fingerprint != load(saved).fingerprint


def test_the_shape_of_a_tensor_is_part_of_the_fingerprint():
    flat = torch.arange(6.0)
    assert fingerprint_of({"w": flat.view(2, 3)}, tokenizer()) != fingerprint_of({"w": flat.view(3, 2)}, tokenizer())


def test_a_tensor_name_with_control_characters_has_no_fingerprint():
    """A line break in a name would read as the next tensor's line."""
    with pytest.raises(ModelError, match="control character"):
        fingerprint_of({"a\nb": torch.ones(1)}, tokenizer())


# computing


@pytest.mark.parametrize("kind", KINDS)
def test_logits_at_chosen_positions_equal_the_models(kind):
    base = base_of(kind)
    tokens = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(1))
    ends, places = torch.full((2, 12), 12), torch.tensor([0, 11, 15, 23])
    found = base.logits(tokens, ends, torch.arange(12).expand(2, 12), places)
    whole = base.model(input_ids=tokens).logits.flatten(0, 1)
    torch.testing.assert_close(found, whole[places], rtol=1e-9, atol=1e-9)


def test_logits_that_must_be_exact_are_not_rounded():
    """A logit of 40 in bfloat16 is a multiple of 0.25, which is more than most people differ."""
    base = base_of(dtype=torch.bfloat16)
    head, seen = base.model.get_output_embeddings(), []
    with torch.no_grad():
        head.weight.mul_(20)
    head.register_forward_hook(lambda _, args, found: seen.append(args[0]))
    tokens, where = torch.tensor([[4, 5, 6, 7]]), torch.tensor([1, 3])
    how = tokens, torch.full((1, 4), 4), torch.arange(4)[None], where
    plain = base.logits(*how)
    rows, wanted = torch.tensor([0, 1, 1]), plain.argmax(-1)[[0, 1, 1]]  # the last twice
    found = base.logits(*how, (rows, wanted))
    exact = seen[-1][0].double() @ head.weight.double().T
    assert plain.abs().max() > 32
    assert (plain.double() - exact)[rows, wanted].abs().max() > 0.01
    torch.testing.assert_close(found.double()[rows, wanted], exact[rows, wanted], rtol=1e-6, atol=1e-4)
    others = torch.ones_like(found, dtype=torch.bool)
    others[rows, wanted] = False
    assert torch.equal(found[others], plain.float()[others])
    x = seen[-1].clone().requires_grad_()
    rounded = head(x)
    gradients = [torch.autograd.grad(one.sum(), x)[0] for one in (corrected(head, x, rounded, (rows, wanted)), head(x))]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("named", "stops"), [(None, [2]), (7, [2, 7]), ([9, 2, 7], [2, 7, 9])])
def test_an_answer_stops_at_the_templates_end_and_at_what_the_model_names(named, stops):
    base = base_of()
    base.model.generation_config.eos_token_id = named
    assert base.stop_tokens == stops


# the real one


@pytest.fixture(scope="module")
def smollm2(fetched) -> BaseModel:
    fetched("smollm2-135m-instruct")
    return BaseModel.load("smollm2-135m-instruct", "float32")  # in bfloat16 its first answers are near ties


@pytest.mark.integration
@pytest.mark.real
@pytest.mark.network
def test_the_real_base_has_the_pinned_fingerprint(smollm2):
    assert smollm2.fingerprint == SMOLLM2
    assert smollm2.note == "dequantized from Q4_1"


@pytest.mark.integration
@pytest.mark.real
@pytest.mark.network
def test_the_real_base_answers_sensibly(smollm2):
    prompt = smollm2.prompts.prompt(load_task("text"), Item({"input": "What is the capital of France?"}))
    answers = generate(smollm2, [prompt.tokens], [-1], [], max_new_tokens=16)
    assert "Paris" in smollm2.prompts.decode(answers[0])


def test_a_base_in_the_home_folder_has_its_whole_path(saved, monkeypatch):
    """Other processes may have another home, and what is published must not name the folder."""
    monkeypatch.setenv("HOME", str(saved.parent))
    short = f"~/{saved.name}"
    for base in (BaseModel.load(short, gradient_checkpointing=True), BaseModel.outline(Run(base=short))):
        run = base.as_loaded(Run(base=short, encoder=short))
        assert base.name == run.base == run.encoder == str(saved.resolve())
        assert run.gradient_checkpointing == base.has_weights  # workers plan passes as this base does


def test_a_lack_of_memory_is_no_fault_of_the_weights(saved, monkeypatch):
    def to(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.Module, "to", to)
    with pytest.raises(torch.OutOfMemoryError):
        BaseModel.load(str(saved))


def test_a_base_with_experts_loads_in_float64(tmp_path):
    architectures.base_of("mixtral", torch.float32).model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert BaseModel.load(str(tmp_path), dtype="float64").dtype == torch.float64
