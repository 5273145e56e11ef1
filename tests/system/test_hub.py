"""What is downloaded of a model repository, and which of its files decide the fingerprint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub import Repo
from hub import hub as hub  # the fixture
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny import KINDS, changed_json, counted, save_encoder, tokenizer

from mta.config import Run
from mta.errors import ModelError
from mta.model.base import BaseModel, prompts_of
from mta.model.encoders import SentenceEncoder
from mta.system.hub import local_folder

NAME = "somebody/model"
FINGERPRINT = "a5090a900c7bd4252652036000b2256b9d9dd36a94683a2c3569b20df6cf066a"  # of the tiny base, since 0.1.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A tiny Llama with its weights in one file."""
    return saved(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """The same in many files and an index."""
    return saved(tmp_path_factory.mktemp("sharded"), max_shard_size="5KB")


def saved(folder: Path, **how) -> Path:
    counted(KINDS["llama"]()).save_pretrained(folder, **how)
    tokenizer().save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict:
    return {name: one for file in folder.glob("model*.safetensors") for name, one in load_file(file).items()}


def duplicated(folder: Path, to: Path) -> Path:
    """A copy with what repositories carry beside the weights that transformers loads."""
    copy = Path(shutil.copytree(folder, to))
    again = {f"layers.{name}": tensor for name, tensor in tensors(folder).items()}
    save_file(again, copy / "consolidated.safetensors")
    for name in ("original", "onnx", "openvino", "checkpoint-500"):
        (copy / name).mkdir()
        save_file(again, copy / name / "model.safetensors")
        (copy / name / "params.json").write_text("{}")
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    save_file({"lora_A": torch.ones(1, 1)}, copy / "adapter_model.safetensors")
    return copy


def publish(hub, folder: Path) -> None:
    hub.repos[NAME] = Repo(private=False)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    hub.repos[NAME].commit({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})


def weights(folder: Path | str) -> list[str]:
    kinds = (path for path in Path(folder).rglob("*") if path.suffix in (".safetensors", ".bin"))
    return sorted(path.relative_to(folder).as_posix() for path in kinds)


def fingerprint(folder: Path | str) -> str:
    return BaseModel.load(str(folder), "float32", "cpu").fingerprint


def test_fingerprints_equal_those_of_existing_banks(whole, sharded):
    assert fingerprint(whole) == fingerprint(sharded) == FINGERPRINT


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_weights_that_are_not_loaded_do_not_change_the_fingerprint(request, kind, tmp_path):
    folder = duplicated(request.getfixturevalue(kind), tmp_path / "more")
    assert fingerprint(folder) == FINGERPRINT


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_only_the_weights_that_are_loaded_are_downloaded(request, hub, kind, tmp_path):
    folder = request.getfixturevalue(kind)
    publish(hub, duplicated(folder, tmp_path / "more"))
    assert weights(local_folder(NAME)) == weights(folder)
    assert fingerprint(NAME) == FINGERPRINT


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_prompts_need_no_weights(request, hub, kind):
    publish(hub, request.getfixturevalue(kind))
    prompts = prompts_of(Run(base=NAME, max_tokens=200))
    assert [path for _, path in hub.requests if path.endswith(".safetensors")] == []
    base = BaseModel.load(NAME, "float32", "cpu", 200)
    assert (prompts.max_tokens, prompts.text("a text")) == (base.prompts.max_tokens, base.prompts.text("a text"))


def test_one_file_is_preferred_to_shards_as_transformers_does(hub, whole, sharded, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "both"))
    other = {name: tensor + 1 for name, tensor in tensors(whole).items()}
    save_file(other, folder / "model.safetensors", {"format": "pt"})
    publish(hub, folder)
    assert weights(local_folder(NAME)) == ["model.safetensors"]
    assert fingerprint(folder) == fingerprint(NAME) != FINGERPRINT
    name = "model.layers.0.mlp.up_proj.weight"
    loaded = BaseModel.load(str(folder), "float32", "cpu").model.get_parameter(name)
    torch.testing.assert_close(loaded, other[name])


def test_weights_that_a_configuration_names_are_downloaded_and_hashed(hub, whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "named"))
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    changed_json(folder / "config.json", transformers_weights="mine.safetensors")
    publish(hub, folder)
    assert weights(local_folder(NAME)) == ["mine.safetensors"]
    assert fingerprint(folder) == fingerprint(NAME) == FINGERPRINT


@pytest.mark.parametrize("name", ["/elsewhere/model.safetensors", "../model.safetensors"])
def test_weights_outside_the_repository_are_not_requested(hub, whole, tmp_path, name):
    folder = Path(shutil.copytree(whole, tmp_path / "named"))
    changed_json(folder / "config.json", transformers_weights=name)
    publish(hub, folder)
    with pytest.raises(ModelError, match="expected safetensors of its own folder"):
        fingerprint(NAME)


@pytest.mark.parametrize("shard", ["*", "w.bin", "../w.safetensors"])
def test_shards_outside_the_repository_are_not_requested(hub, sharded, tmp_path, shard):
    folder = duplicated(sharded, tmp_path / "more")
    torch.save({}, folder / "w.bin")
    changed_json(folder / "model.safetensors.index.json", weight_map={"x": shard})
    publish(hub, folder)
    with pytest.raises(ModelError, match="expected safetensors of its own folder"):
        local_folder(NAME)
    assert not [path for _, path in hub.requests if path.endswith((".bin", ".safetensors"))]


def test_a_distributed_checkpoint_is_refused(whole, tmp_path):
    """transformers would load it in place of model.safetensors, which the fingerprint is of."""
    folder = Path(shutil.copytree(whole, tmp_path / "parts"))
    shutil.copy(folder / "model.safetensors", folder / "shard-00000-model-00001-of-00001.safetensors")
    with pytest.raises(ModelError, match="distributed checkpoint"):
        fingerprint(folder)


def test_an_adapter_beside_the_weights_is_not_downloaded(hub, whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "adapted"))
    changed_json(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="owner/name")
    save_file({"lora_A": torch.ones(1, 1)}, folder / "adapter_model.safetensors")
    publish(hub, folder)
    assert fingerprint(NAME) == FINGERPRINT


def test_the_modules_of_an_encoder_are_downloaded(hub, tmp_path):
    folder = save_encoder(tmp_path / "encoder", [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}])
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text(json.dumps({"in_features": 8, "out_features": 4, "bias": False}))
    save_file({"linear.weight": torch.ones(4, 8)}, folder / "2_Dense" / "model.safetensors")
    for name in ("onnx", "openvino"):
        (folder / name).mkdir()
        save_file({"x": torch.ones(1)}, folder / name / "model.safetensors")
    publish(hub, folder)
    here, there = SentenceEncoder(str(folder), "cpu"), SentenceEncoder(NAME, "cpu")
    assert weights(local_folder(NAME)) == ["2_Dense/model.safetensors", "model.safetensors"]
    assert there.fingerprint == here.fingerprint
    torch.testing.assert_close(there.encode(["a"]), here.encode(["a"]))


def test_a_model_that_was_downloaded_loads_without_a_network(hub, sharded, monkeypatch):
    publish(hub, sharded)
    local_folder(NAME)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fingerprint(NAME) == FINGERPRINT
    assert hub.requests == []
