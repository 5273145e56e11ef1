"""Open a bank: complete and for this base, or refused; and mark a bank after a person in it was forgotten."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY_RUN, HashEncoder, people_of
from damage import BASE, HASHED, corrupt, flipped, rewritten
from damage import folder as folder  # the fixture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import base_of

from mta.bank.bank import Bank
from mta.bank.build import build_bank
from mta.bank.context import Build
from mta.bank.format import file_hashes, read_info
from mta.bank.members import Members
from mta.bank.notes import mark_stale, parts_to_rebuild
from mta.errors import BankError, BankMismatch, BankNotFound
from mta.model.encoders import encode_people

ALL = (*HASHED, "members.json", "bank.json")


# -- whole -------------------------------------------------------------------------------------------------------------


def test_a_whole_bank_opens(folder, task):
    bank = Bank.open(folder, BASE)
    assert len(bank) == 3
    assert bank.task == task
    assert bank.hash == read_info(folder).hash
    assert bank.anchors.scale == 8.0
    torch.testing.assert_close(bank.vectors.norm(dim=1), torch.ones(3))
    assert set(bank.info.files) == set(HASHED)


def test_similarity_is_the_cosine_of_person_and_anchor(folder, task):
    bank = Bank.open(folder, BASE)
    people = people_of(12, prefix="c")
    vectors = encode_people(HashEncoder(), task, people, "both")
    found = bank.similarity(vectors)
    expected = torch.nn.functional.cosine_similarity(vectors[:, None], bank.vectors[None], dim=2)
    torch.testing.assert_close(found, expected)
    # The anchors themselves are among these people.
    torch.testing.assert_close(found.max(0).values, torch.ones(3))
    anchors = [n for n, person in enumerate(people) if "anchor" in bank.info.members.parts_of(person.id)]
    assert found.argmax(0).tolist() == anchors


def test_the_encoder_must_have_the_weights_the_anchors_were_placed_with(folder):
    bank = Bank.open(folder, BASE)
    placed = {"encoder": "base", "encoder_fingerprint": BASE.fingerprint}
    encoder = replace(bank, info=bank.info.model_copy(update=placed)).encoder(BASE)
    assert (encoder.name, encoder.fingerprint) == ("base", BASE.fingerprint)
    other = replace(bank, info=bank.info.model_copy(update={"encoder": "base", "encoder_fingerprint": "f" * 64}))
    with pytest.raises(BankMismatch) as caught:
        other.encoder(BASE)
    assert str(caught.value) == (
        f"encoder 'base' has other weights (sha256 {BASE.fingerprint[:8]}…) than when the bank was built (ffffffff…)\n"
        "  Load the encoder that the bank was built with, or rebuild the bank."
    )


# -- refused -----------------------------------------------------------------------------------------------------------


def test_another_base_is_refused(folder):
    other = base_of("qwen3")
    with pytest.raises(BankMismatch) as caught:
        Bank.open(folder, other)
    assert str(caught.value) == (
        f"{folder} was built for base 'tiny-llama' (sha256 {BASE.fingerprint[:8]}…), "
        f"but the loaded base is 'tiny-qwen3' (sha256 {other.fingerprint[:8]}…)\n"
        "  A bank works only with the base that it was trained on. Load that base, or rebuild:  "
        "mta bank build --base tiny-qwen3"
    )


@pytest.mark.parametrize("name", HASHED)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert corrupt(folder).startswith(f"{folder / name} is missing\n  ")


def test_a_folder_without_a_bank_is_not_called_corrupt(tmp_path):
    with pytest.raises(BankNotFound) as caught:
        Bank.open(tmp_path / "no", BASE)
    assert str(caught.value) == (
        f"no bank at {tmp_path / 'no'}: bank.json is missing\n"
        "  Give the folder of a bank (--bank FOLDER), or build a bank: mta bank build --help"
    )


@pytest.mark.parametrize("name", ["/proc/self/pagemap", "../secret", "task_lora/training_args.json"])
def test_a_sealed_bank_that_names_another_file_is_refused_and_the_file_not_read(folder, monkeypatch, name):
    """Hashing this machine's files would reveal them, or never end."""
    monkeypatch.setattr("mta.bank.format.file_hashes", lambda *_: pytest.fail("a file was read"))
    described = json.loads((folder / "bank.json").read_text())
    rewritten(folder, files=described["files"] | {name: "0" * 64})
    assert f"{name!r}, which is no file of a bank" in corrupt(folder)


@pytest.mark.parametrize("name", HASHED)
def test_a_changed_file_is_named_with_both_hashes(folder, name):
    flipped(folder / name, -1)
    (found,) = file_hashes(folder, [name]).values()
    assert corrupt(folder) == (
        f"{folder / name} was changed or cut short: its sha256 is {found[:12]}…, "
        f"bank.json says {read_info(folder).files[name][:12]}…\n"
        "  Copy the bank again from its source. Or remove it, and repeat the command that built it:  "
        f"rm -r {folder}"
    )


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(ALL), part=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(folder, name, part, bits):
    path, info = folder / name, read_info(folder)
    whole = path.read_bytes()
    flipped(path, int(part * len(whole)), bits)
    try:
        found = Bank.open(folder, BASE)
    except BankError:
        pass
    else:  # white space between two values
        assert name == "bank.json"
        assert found.info == info
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("version", [4, 6])
def test_a_bank_of_another_schema_version_is_refused(folder, version):
    rewritten(folder, version=version)
    assert corrupt(folder) == (
        f"{folder / 'bank.json'} has schema version {version}; this mta reads version 5\n"
        "  Use the version of mta that wrote it, or build the bank again:  mta bank build --out NEW"
    )


@pytest.mark.parametrize(("changes", "errors"), [({"colour": "red"}, "1 v"), ({"task": {"name": "x"}}, "3 v")])
def test_a_sealed_description_of_no_bank_is_refused(folder, changes, errors):
    rewritten(folder, **changes)
    assert corrupt(folder).startswith(f"{folder / 'bank.json'} does not describe a bank: {errors}alidation error")


@pytest.mark.parametrize("described", ["", "[]", "null", "3", "{}", '{"version": 3}', "[" * 100000, "\x00"])
def test_a_file_without_a_description_is_refused(folder, described):
    (folder / "bank.json").write_text(described)
    corrupt(folder)


def test_files_that_do_not_fit_together_are_refused(folder):
    """Every hash is right, but the index is of two people."""
    save_file({"vectors": torch.zeros(2, 8)}, folder / "index.safetensors")
    rewritten(folder, files=file_hashes(folder, HASHED))
    assert corrupt(folder).startswith(f"{folder}: anchors, index, and base do not match\n")


# -- whom it was trained on --------------------------------------------------------------------------------------------


def test_a_bank_without_its_members_file_has_the_same_hash_and_no_members(folder):
    before = Bank.open(folder, BASE)
    assert before.info.members.parts_of("t2") == ["task LoRA"]
    (folder / "members.json").unlink()
    after = Bank.open(folder, BASE)
    assert after.hash == before.hash
    assert (after.info.members.hashed, after.info.members.parts_of("t2")) == (None, [])
    assert (after.info.members.task, after.info.members.candidates, after.info.members.anchors) == (7, 12, 3)


def test_the_description_alone_does_not_give_the_members_key_away(folder):
    """Not even to who knows all ids and all settings: without everybody's histories no key can be made."""
    hashed, described = read_info(folder).members.hashed, (folder / "bank.json").read_text()
    assert hashed.key not in described
    assert not any(one in described for one in (*hashed.task, *hashed.candidates))
    ids = [[f"t{n}" for n in range(4)], [f"c{n}" for n in range(12)], []]
    assert Members.of(json.loads(described)["work"], *ids).hashed.key != hashed.key


# -- forgetting --------------------------------------------------------------------------------------------------------


def test_forgetting_lists_the_parts_trained_on_a_person(folder):
    members = read_info(folder).members
    anchor = next(p.id for p in people_of(12, prefix="c") if "anchor" in members.parts_of(p.id))
    other = next(p.id for p in people_of(12, prefix="c") if "calibration" in members.parts_of(p.id))
    assert parts_to_rebuild(folder) == []
    assert mark_stale(folder, other) == ["clusters", "calibration"]
    assert parts_to_rebuild(folder) == ["calibration", "clusters"]
    assert mark_stale(folder, anchor) == ["task LoRA", "clusters", "anchor"]
    assert mark_stale(folder, "t2") == ["task LoRA"]
    assert json.loads((folder / "needs-rebuild.json").read_text()) == {
        "needs_rebuild": ["anchor", "calibration", "clusters", "task LoRA"],
        "forgotten": sorted(map(members.hash_of, (anchor, other, "t2"))),
    }
    assert mark_stale(folder, anchor) == ["task LoRA", "clusters", "anchor"]  # again


# -- on another machine ------------------------------------------------------------------------------------------------


def test_a_bank_that_was_built_on_a_gpu_opens_on_the_device_of_this_machine(folder):
    described = json.loads((folder / "bank.json").read_text())
    rewritten(folder, run=described["run"] | {"device": "cuda"})
    bank = Bank.open(folder, BASE)
    assert (bank.info.run.device, bank.hash) == ("auto", described["hash"])
    assert bank.info == Bank.open(folder, BASE).info


def test_the_device_a_bank_is_built_on_is_no_part_of_it(folder, tmp_path, task):
    people = people_of(4, prefix="t"), people_of(12, prefix="c")
    build_bank(
        Build(BASE, task, HashEncoder(), *people, TINY_RUN.model_copy(update={"device": "cpu"}), tmp_path / "cpu")
    )
    here, there = read_info(folder), read_info(tmp_path / "cpu")
    assert (there.hash, there.work) == (here.hash, here.work)
    assert json.loads((tmp_path / "cpu" / "bank.json").read_text())["run"]["device"] == "auto"
