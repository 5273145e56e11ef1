"""Folders of models from other people: nothing in them runs as code, and pickles are not opened."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import base_of, changed_json, save_base, save_encoder

from mta.bank.bank import Bank
from mta.bank.format import check_base, read_info
from mta.errors import BankMismatch, DataError, ModelError
from mta.model.base import BaseModel
from mta.model.encoders import SentenceEncoder
from mta.model.fingerprint import folder_fingerprint
from mta.tools.cost import Shape

FINGERPRINT = "2b4a053134dd76dffeaa3f429a8db89ec3bc1d940a5574f3fe95c916d24347ee"  # of the tiny encoder, since 0.1.0
KIND = "sentence_transformers.models"
DENSE = {"path": "2_Dense", "type": f"{KIND}.Dense"}


@pytest.fixture
def encoder(tmp_path) -> Path:
    return save_encoder(tmp_path / "encoder")


@pytest.fixture
def base(tmp_path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def marker(tmp_path) -> Path:
    """A file that malicious code writes when it runs."""
    return tmp_path / "code-ran"


def plant(folder: Path, marker: Path, *classes: str, name: str = "evil") -> None:
    """Put a Python module in the folder that writes the marker when it is imported."""
    lines = [f"open({str(marker)!r}, 'w').close()", *(f"class {one}: pass" for one in classes)]
    (folder / f"{name}.py").write_text("\n".join(lines))


class Payload:
    """Unpickling creates the file of that name."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def vectors(folder: Path) -> torch.Tensor:
    return SentenceEncoder(str(folder), "cpu").encode(["a", "some more words"])


def refused(call, *args) -> str:
    with pytest.raises(ModelError) as caught:
        call(*args)
    return str(caught.value)


def load(folder: Path) -> BaseModel:
    return BaseModel.load(str(folder), "float32", "cpu")


# encoders


def test_an_ordinary_encoder_keeps_its_fingerprint_and_encodes(encoder):
    made = SentenceEncoder(str(encoder), "cpu")
    assert made.fingerprint == FINGERPRINT
    assert made.encode(["a", "b"]).shape == (2, 8)
    assert folder_fingerprint(encoder, made._model.tokenizer) == FINGERPRINT


def test_a_cased_encoder_that_is_to_lower_its_texts_keeps_its_fingerprint(encoder):
    changed_json(encoder / "sentence_bert_config.json", do_lower_case=True)
    made = SentenceEncoder(str(encoder), "cpu")
    assert made.fingerprint == folder_fingerprint(encoder, made._model.tokenizer) != FINGERPRINT


NOT_OURS = ("evil.Thing", "os.path.Thing", "sentence_transformers_evil.Dense")
LOADING_OTHERS = (f"{KIND}.Router", f"{KIND}.CLIPModel", "sentence_transformers.util.misc.importlib")


@pytest.mark.parametrize("kind", [*NOT_OURS, *LOADING_OTHERS])
def test_a_module_that_is_not_of_sentence_transformers_or_loads_others_by_name_is_refused_unread(encoder, marker, kind):
    plant(encoder, marker, "Thing")
    save_modules(encoder, {"path": "", "type": kind})
    assert f"names a module of type {kind!r}; expected one of Transformer, Pooling, " in refused(vectors, encoder)
    assert not marker.exists()


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "a/../../b", "*"])
def test_a_module_outside_the_folder_is_refused(encoder, path):
    save_modules(encoder, {"path": path, "type": f"{KIND}.Normalize"})
    assert f"names a module at {path!r}; expected a folder inside" in refused(vectors, encoder)


@pytest.mark.parametrize("text", ["{", "{}", "[]", "[1]", '[{"path": ""}]'])
def test_a_module_list_that_is_none_is_refused(encoder, text):
    (encoder / "modules.json").write_text(text)
    assert "modules.json is not a list of modules" in refused(vectors, encoder)


def test_a_tokenizer_class_of_a_folder_is_refused(encoder, base, marker):
    """A base whose class transformers knows is loaded with the class of its own."""
    own = {"AutoTokenizer": ["evil.Words", "evil.Words"]}
    for folder in (encoder, base):
        plant(folder, marker, "Words")
        changed_json(folder / "tokenizer_config.json", tokenizer_class="Words", auto_map=own)
    with suppress(ModelError):
        load(base)
    changed_json(encoder / "config.json", model_type="evil")
    assert "needs Python code from its own folder" in refused(lambda: SentenceEncoder(str(encoder), "cpu").fingerprint)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer_name_or_path", "owner/name"),
        ("backend", "onnx"),
        ("model_args", {"weights_only": False}),
        ("model_kwargs", {"use_safetensors": False}),
        ("model_kwargs", {"allow_all_kernels": True}),
        ("config_args", {"code_revision": "main"}),
        ("tokenizer_args", {"gguf_file": "other.gguf"}),
        ("processor_kwargs", ["padding_side"]),
    ],
)
def test_a_setting_that_would_load_something_else_is_refused(encoder, key, value):
    changed_json(encoder / "sentence_bert_config.json", **{key: value})
    assert "sentence_bert_config.json sets " in refused(vectors, encoder)


def test_settings_that_change_numbers_alone_are_taken(encoder):
    changed_json(
        encoder / "sentence_bert_config.json",
        model_args={"attn_implementation": "eager", "trust_remote_code": True},
        tokenizer_args={"padding_side": "right"},
    )
    assert vectors(encoder).shape == (2, 8)


def test_attention_code_from_the_hub_is_refused_in_an_encoders_settings(encoder):
    changed_json(encoder / "sentence_bert_config.json", model_args={"attn_implementation": "owner/kernel"})
    assert "sets attn_implementation 'owner/kernel'; expected eager or sdpa" in refused(vectors, encoder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "flash_attention_2"),
        ("_attn_implementation", "flash_attention_3"),
        ("_attn_implementation_internal", "flash_attention_2"),
        ("attn_implementation", {"": "flash_attention_2"}),
        ("experts_implementation", "sonicmoe"),
        ("attn_implementation", "owner/kernel"),
        ("_attn_implementation", "owner/kernel"),
        ("experts_implementation", "owner/kernel"),
    ],
)
@pytest.mark.parametrize("within", [True, False])
def test_an_implementation_that_transformers_would_fetch_is_refused(encoder, base, key, value, within):
    for folder, call in ((encoder, vectors), (base, load)):
        changed_json(folder / "config.json", **({"text_config": {key: value}} if within else {key: value}))
        assert f"config.json sets {key} {value!r}; expected eager" in refused(call, folder)


def test_implementations_of_torch_and_transformers_are_taken(encoder, base):
    for folder in (encoder, base):
        own = {"_attn_implementation": "eager", "_attn_implementation_autoset": True, "attn_implementation": None}
        changed_json(folder / "config.json", experts_implementation="batched_mm", **own)
    assert vectors(encoder).shape == (2, 8)
    assert load(base).fingerprint


@pytest.mark.parametrize("listed", [["config.4.0.0.json"], None])
def test_a_configuration_that_points_to_another_one_is_refused(encoder, base, listed):
    """transformers would load that file in place of config.json, which alone is checked."""
    for folder, call in ((encoder, vectors), (base, load)):
        shutil.copy(folder / "config.json", folder / "config.4.0.0.json")
        changed_json(folder / "config.json", configuration_files=listed)
        assert "config.json sets configuration_files" in refused(call, folder)


@pytest.mark.parametrize("shard", ["w.bin", "../outside.safetensors", "*.safetensors", "[a].safetensors", 1])
def test_shards_that_are_no_safetensors_of_the_folder_are_refused(encoder, base, marker, shard):
    for folder, call in ((encoder, vectors), (base, load)):
        (folder / "model.safetensors").unlink()
        torch.save({"x": Payload(marker)}, folder / "w.bin")
        index = {"metadata": {}, "weight_map": {"x": shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert f"names {shard!r} as its weights; expected safetensors of its own folder" in refused(call, folder)
        assert not marker.exists()


def test_a_quantized_encoder_is_refused(encoder):
    changed_json(encoder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert "is quantized; expected plain weights" in refused(vectors, encoder)


@pytest.mark.parametrize("place", ["", "2_Dense/"])
def test_pickled_weights_of_an_encoder_and_of_its_dense_module_are_not_opened(encoder, marker, place):
    save_dense(encoder)
    (encoder / place / "model.safetensors").unlink()
    torch.save({"x": Payload(marker)}, encoder / place / "pytorch_model.bin")
    assert f"it has no {place}model.safetensors" in refused(vectors, encoder)
    assert not marker.exists()


@pytest.mark.parametrize("how", [{}, {"model_args": {"weights_only": False}}])
def test_pickled_weights_that_a_configuration_names_are_not_opened(encoder, base, marker, how):
    changed_json(encoder / "sentence_bert_config.json", **how)
    for folder, call in ((encoder, vectors), (base, load)):
        torch.save({"x": Payload(marker)}, folder / "adapter_model.bin")
        changed_json(folder / "config.json", transformers_weights="adapter_model.bin")
        assert refused(call, folder)
        assert not marker.exists()
    assert "names 'adapter_model.bin' as its weights; expected safetensors" in refused(load, base)


@pytest.mark.parametrize("name", ["evil.Thing", "os.system", "torch.utils.bottleneck.__main__"])
def test_a_dense_module_with_an_activation_of_its_own_is_refused(encoder, marker, name):
    plant(encoder, marker, "Thing")
    save_dense(encoder)
    changed_json(encoder / "2_Dense" / "config.json", activation_function=name)
    assert f"names {name!r} as its activation; expected a class of torch.nn" in refused(vectors, encoder)
    assert not marker.exists()


def test_a_dense_module_of_safetensors_computes_and_is_part_of_the_fingerprint(encoder):
    save_dense(encoder)
    made = SentenceEncoder(str(encoder), "cpu")
    assert made.encode(["a"]).shape == (1, 4)
    before = made.fingerprint
    weights = load_file(encoder / "2_Dense" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, encoder / "2_Dense" / "model.safetensors")
    assert len({FINGERPRINT, before, SentenceEncoder(str(encoder), "cpu").fingerprint}) == 3


def test_weights_in_a_folder_of_their_own_are_part_of_the_fingerprint(encoder, tmp_path):
    """The layout of older sentence encoders: the transformer in 0_Transformer, nothing of it beside modules.json."""
    inner = Path(shutil.move(encoder, tmp_path / "0_Transformer"))
    outer = tmp_path / "outer"
    outer.mkdir()
    listed = json.loads((inner / "modules.json").read_text())
    (outer / "modules.json").write_text(json.dumps([listed[0] | {"path": "0_Transformer"}, listed[1]]))
    shutil.move(inner, outer / "0_Transformer")
    shutil.move(outer / "0_Transformer" / "1_Pooling", outer / "1_Pooling")
    made = SentenceEncoder(str(outer), "cpu")
    assert made.encode(["a"]).shape == (1, 8)
    before = made.fingerprint
    path = outer / "0_Transformer" / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert SentenceEncoder(str(outer), "cpu").fingerprint != before


@pytest.mark.parametrize("kind", ["CrossEncoder", "SparseEncoder"])
def test_a_folder_of_another_kind_of_model_is_refused(encoder, kind):
    changed_json(encoder / "config_sentence_transformers.json", model_type=kind)
    assert f"is a {kind}; expected a SentenceTransformer" in refused(vectors, encoder)


# bases


def test_a_model_class_of_a_folder_is_refused(encoder, base, marker):
    for folder, call, kind in ((encoder, vectors, "AutoModel"), (base, load, "AutoModelForCausalLM")):
        plant(folder, marker, "Config", "Model")
        own = {"AutoConfig": "evil.Config", kind: "evil.Model"}
        changed_json(folder / "config.json", model_type="evil", auto_map=own)
        assert "needs Python code from its own folder, which mta never runs" in refused(call, folder)
    with pytest.raises(ValueError, match="cannot read the shapes of"):
        Shape.of(str(base))
    assert not marker.exists()


def test_code_beside_a_base_that_transformers_knows_is_left_alone(base, marker):
    """Repositories of known architectures often carry the code they were first published with."""
    plant(base, marker, "Config", "Model", "Words")
    own = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    fingerprint = load(base).fingerprint
    changed_json(base / "config.json", auto_map=own)
    (base / "custom_generate").mkdir()
    plant(base / "custom_generate", marker, name="generate")
    assert load(base).fingerprint == fingerprint
    assert not marker.exists()


def test_a_chat_template_cannot_reach_python(base, marker):
    (base / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        f"{{{{ cycler.__init__.__globals__.os.open({str(marker)!r}, 65) }}}}"
    )
    with pytest.raises(DataError, match="the base's chat template rejects these messages: access to"):
        load(base)
    assert not marker.exists()


def test_weights_that_a_part_of_the_configuration_names_are_refused(base):
    """transformers takes some models' text_config for the whole configuration."""
    changed_json(base / "config.json", text_config={"transformers_weights": "other.safetensors"})
    assert "a part of config.json sets transformers_weights" in refused(load, base)


def test_an_adapter_beside_a_base_is_refused(base):
    """transformers would load it too, but only where PEFT is installed."""
    changed_json(base / "adapter_config.json", peft_type="LORA", base_model_name_or_path="owner/name")
    assert "holds adapter_config.json" in refused(load, base)


# what a bank names


@pytest.fixture
def bank(tiny_bank_folder, tmp_path, cache) -> Path:
    return Path(shutil.copytree(tiny_bank_folder, tmp_path / "bank"))


def test_an_encoder_with_other_weights_is_refused_before_it_is_loaded(bank, encoder):
    base = base_of()
    changed_json(encoder / "config.json", vocab_size=7)  # loading the weights would fail
    with pytest.raises(BankMismatch, match="has other weights"):
        Bank.open(bank, base).encoder(base, str(encoder))
    assert "cannot be loaded as a sentence encoder" in refused(vectors, encoder)


def test_a_base_with_other_weights_is_refused_before_it_is_loaded(bank, base):
    info = read_info(bank)
    changed_json(base / "config.json", vocab_size=7)  # loading the weights would fail
    run = info.run.model_copy(update={"base": str(base), "device": "cpu"})
    with pytest.raises(BankMismatch, match="was built for base 'tiny-llama'"):
        BaseModel.of(run, lambda fingerprint: check_base(bank, info, run.base, fingerprint))
    assert "cannot be loaded as a causal language model" in refused(load, base)


def save_modules(folder: Path, *more: dict) -> None:
    path = folder / "modules.json"
    listed = [*json.loads(path.read_text()), *more]
    path.write_text(json.dumps([{"idx": n, "name": str(n), **module} for n, module in enumerate(listed)]))


def save_dense(folder: Path) -> None:
    save_modules(folder, DENSE)
    (folder / "2_Dense").mkdir()
    how = {
        "in_features": 8,
        "out_features": 4,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    (folder / "2_Dense" / "config.json").write_text(json.dumps(how))
    save_file({"linear.weight": torch.ones(4, 8)}, folder / "2_Dense" / "model.safetensors")
