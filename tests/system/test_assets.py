"""Assets: pinned, complete or absent, fit for two processes, clear without a network. pip is real, the wheels tiny."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from mta.errors import AssetError
from mta.system import assets
from mta.system.assets import MARKER, Asset, cache_dir, fetch, resolve

MEMBERS = {"tiny_words/words.txt": b"one two three", "tiny_words/deep/more.txt": b"four"}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def build_wheel(folder, members, name="tiny-words"):
    """A wheel as pip knows it; the metadata is all pip looks at before downloading."""
    module = name.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        info = f"{module}-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def tiny_asset(wheel, members=MEMBERS, name="tiny"):
    return Asset(
        name=name,
        kind="data",
        requirement="tiny-words==1.0",
        wheel_sha256=sha256(wheel.read_bytes()),
        wheel_bytes=wheel.stat().st_size,
        folder="tiny_words",
        files=tuple(path.partition("/")[2] for path in members),
        licence="CC0-1.0",
    )


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """The only place pip looks at."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def offer(monkeypatch):
    """Make assets known beside the real ones."""

    def put(*more):
        monkeypatch.setattr(assets, "ASSETS", {**assets.ASSETS, **{asset.name: asset for asset in more}})

    return put


@pytest.fixture
def tiny(wheels, offer):
    asset = tiny_asset(build_wheel(wheels, MEMBERS))
    offer(asset)
    return asset


def kept():
    """What is in the cache, but for locks."""
    root = cache_dir() / "assets"
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix != ".lock")


# fetching


def test_fetch_writes_the_named_members_and_a_marker(tiny):
    lines = []
    folder = fetch("tiny", lines.append)
    assert folder == cache_dir() / "assets" / "tiny"
    assert (folder / "words.txt").read_bytes() == b"one two three"
    assert (folder / "deep" / "more.txt").read_bytes() == b"four"
    assert lines == ["fetching tiny (0 MB, CC0-1.0)…"]
    marker = json.loads((folder / MARKER).read_text())
    assert marker["name"] == "tiny"
    assert marker["requirement"] == "tiny-words==1.0"
    assert marker["wheel_sha256"] == tiny.wheel_sha256
    assert marker["sizes"] == {"words.txt": 13, "deep/more.txt": 4}


def test_second_fetch_needs_no_network_and_no_writing(tiny, wheels, monkeypatch):
    folder = fetch("tiny")
    shutil.rmtree(wheels)
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr(assets, "FileLock", None)
    assert fetch("tiny", pytest.fail) == folder


@pytest.mark.integration
@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "words.txt").write_text("cut"),
        lambda folder: (folder / "words.txt").unlink(),
        lambda folder: (folder / MARKER).unlink(),
        lambda folder: (folder / MARKER).write_text("{"),
        lambda folder: (folder / MARKER).write_text("[]"),
    ],
    ids=["file cut short", "file gone", "marker gone", "marker cut short", "marker of another shape"],
)
def test_incomplete_folder_is_fetched_again(tiny, spoil):
    folder = fetch("tiny")
    spoil(folder)
    assert (fetch("tiny") / "words.txt").read_bytes() == b"one two three"


@pytest.mark.integration
def test_new_pin_replaces_the_folder_of_an_old_one(tiny, wheels, offer):
    fetch("tiny")
    newer = {"tiny_words/words.txt": b"new"}
    offer(tiny_asset(build_wheel(wheels, newer), newer))
    fetch("tiny")
    assert kept() == ["tiny", f"tiny/{MARKER}", "tiny/words.txt"]


def test_only_named_members_leave_the_wheel(wheels, offer, tmp_path):
    evil = {"../../evil.txt": b"x", "/evil.txt": b"x", "tiny_words/deep/../../../evil.txt": b"x"}
    offer(tiny_asset(build_wheel(wheels, {**MEMBERS, **evil, "tiny_words/other.txt": b"x"})))
    fetch("tiny")
    assert kept() == ["tiny", f"tiny/{MARKER}", "tiny/deep", "tiny/deep/more.txt", "tiny/words.txt"]
    assert not list(tmp_path.rglob("evil.txt"))


def test_pip_folder_in_the_working_directory_is_not_run(tiny, tmp_path, monkeypatch):
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").write_text("raise SystemExit('wrong pip')")
    monkeypatch.chdir(tmp_path)
    assert fetch("tiny").is_dir()


# refusing


def test_wheel_with_wrong_hash_is_refused(tiny, offer):
    offer(replace(tiny, wheel_sha256="0" * 64))
    with pytest.raises(AssetError) as caught:
        fetch("tiny")
    assert caught.value.message == (
        f"the wheel of 'tiny' (tiny-words==1.0) has a wrong checksum: sha256 {tiny.wheel_sha256}, expected {'0' * 64}"
    )
    assert caught.value.hint.startswith("The package index served another file than the pinned one; nothing was saved.")
    assert kept() == []


def test_member_that_the_wheel_lacks(tiny, offer):
    offer(replace(tiny, files=("absent.txt",)))
    with pytest.raises(AssetError, match=r"^the wheel of 'tiny' has no tiny_words/absent\.txt"):
        fetch("tiny")
    assert kept() == []


def test_no_network_says_what_to_do(tiny, wheels):
    next(wheels.glob("*.whl")).unlink()
    with pytest.raises(AssetError) as caught:
        fetch("tiny")
    assert str(caught.value) == (
        "cannot fetch 'tiny': pip download tiny-words==1.0 failed "
        "(No matching distribution found for tiny-words==1.0)\n"
        "  The first fetch needs a network. On a machine with a network, run:\n"
        "    pip download --no-deps --dest wheels tiny-words==1.0\n"
        "  copy wheels/ here and set PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels; or set MTA_CACHE to a filled cache."
    )
    assert kept() == []


def test_python_without_pip(tiny, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"^cannot fetch 'tiny': this Python has no pip") as caught:
        fetch("tiny")
    assert "python -m ensurepip" in caught.value.hint


def test_cache_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match=r"^cannot save 'tiny' in ") as caught:
        fetch("tiny")
    assert "set MTA_CACHE" in caught.value.hint


def test_unknown_asset_lists_the_known_ones():
    with pytest.raises(AssetError) as caught:
        fetch("smollm3")
    assert caught.value.message == (
        "unknown asset: 'smollm3'; expected one of smollm2-135m-instruct, all-minilm-l6-v2, movielens-100k"
    )


# more than one process

WORKER = """
import json, os, sys
from mta.system import assets

asset = assets.Asset(**json.loads(sys.argv[1]))
assets.ASSETS = {asset.name: asset}

def say(line):
    print(line, flush=True)
    if sys.argv[2] in line:
        os._exit(9)  # as abrupt as a kill: nothing is cleaned up

print(assets.fetch(asset.name, say))
"""


def worker(asset, die_at="never"):
    spec = {field: getattr(asset, field) for field in Asset.__dataclass_fields__}
    env = {**os.environ, "PYTHONPATH": str(Path(assets.__file__).parents[2]), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", WORKER, json.dumps(spec), die_at]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, encoding="utf-8")


@pytest.mark.integration
def test_two_processes_at_once_fetch_once(tiny):
    (cache_dir() / "assets").mkdir(parents=True)
    with FileLock(cache_dir() / "assets" / "tiny.lock"):
        both = [worker(tiny), worker(tiny)]
        assert {one.stdout.readline() for one in both} == {"waiting for another process that fetches tiny…\n"}
    said = [one.communicate()[0].splitlines() for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert sorted(map(len, said)) == [1, 2]  # one fetched, the other found it done
    assert [lines[-1] for lines in said] == [str(cache_dir() / "assets" / "tiny")] * 2
    assert not list(cache_dir().rglob("*.partial-*"))


@pytest.mark.integration
def test_killed_half_way_starts_again_clean(tiny):
    killed = worker(tiny, die_at="fetching")
    killed.communicate()
    assert killed.returncode == 9
    (leftover,) = (cache_dir() / "assets").glob("tiny.partial-*")
    (leftover / "members").mkdir()
    (leftover / "members" / "words.txt").write_text("half")
    folder = fetch("tiny")
    assert (folder / "words.txt").read_bytes() == b"one two three"
    assert not leftover.exists()


def test_clearing_up_spares_an_asset_with_a_longer_name(tiny):
    other = cache_dir() / "assets" / "tiny-er.partial-1"
    other.mkdir(parents=True)
    fetch("tiny")
    assert other.is_dir()


def test_import_is_light():
    code = "import sys, mta.system.assets; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(Path(assets.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


# names


def test_cache_dir_is_the_users_unless_set(monkeypatch, tmp_path):
    monkeypatch.setenv("MTA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTA_CACHE", "here")
    assert cache_dir() == tmp_path / "here"
    monkeypatch.setenv("MTA_CACHE", "~/there")
    assert cache_dir() == Path.home() / "there"
    for unset in ("", None):
        monkeypatch.setenv("MTA_CACHE", unset) if unset is not None else monkeypatch.delenv("MTA_CACHE")
        assert cache_dir().is_absolute()
        assert "mta" in cache_dir().parts


def test_resolve_fetches_an_asset(tiny):
    assert resolve("tiny") == str(cache_dir() / "assets" / "tiny")
    assert (cache_dir() / "assets" / "tiny" / "words.txt").exists()


def test_the_cache_of_an_earlier_release_is_used(tiny, wheels):
    folder = fetch("tiny")
    marker = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps(marker | {"member_sha256s": {"words.txt": "0" * 64}}))
    shutil.rmtree(wheels)
    assert fetch("tiny", pytest.fail) == folder


def test_resolve_leaves_what_exists_and_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "people.jsonl").touch()
    for there in ("model", "./model", "model/", "people.jsonl", str(tmp_path / "model")):
        assert resolve(there) == there
    assert resolve("~/model") == os.path.join(str(tmp_path), "model")
    for hub_id in ("HuggingFaceTB/SmolLM2-135M-Instruct", "gpt2", "BAAI/bge-small-en-v1.5"):
        assert resolve(hub_id) == hub_id


@pytest.mark.parametrize(
    "path", ["./model", "../model", "~/no such model", "/no/model", "model.gguf", "a/b.safetensors", "a/"]
)
def test_resolve_refuses_a_path_that_is_not_there(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssetError) as caught:
        resolve(path)
    assert caught.value.message == (
        f"no such file or folder: {path}; expected an existing path, a hub id (owner/name) or one of the assets "
        "smollm2-135m-instruct, all-minilm-l6-v2, movielens-100k"
    )


# converting


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
    offer(replace(tiny_asset(build_wheel(wheels, members), members), kind="model"))
    lines = []
    capfd.readouterr()
    folder = fetch("tiny", lines.append)
    assert capfd.readouterr() == ("", "")
    assert lines == ["fetching tiny (0 MB, CC0-1.0)…", "converting tiny to safetensors…"]
    assert_ordinary_folder(folder)

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(folder)("abb")["input_ids"][-1] == 5


def assert_ordinary_folder(folder):
    assert not list(folder.glob("*.gguf"))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    for text in folder.glob("*.json"):
        assert ".partial-" not in text.read_text(encoding="utf-8"), f"{text.name} names a temporary folder"


# the real ones


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


@pytest.mark.integration
@pytest.mark.network
def test_real_smollm2_is_ready_to_use(fetched):
    folder = fetched("smollm2-135m-instruct")
    assert_ordinary_folder(folder)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 30
    assert {"model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {path.name for path in folder.iterdir()}
    assert assets.ASSETS["smollm2-135m-instruct"].note == "dequantized from Q4_1"
