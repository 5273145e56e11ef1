"""Banks of LoRAs that exist already: their merges are those of PEFT."""

import json
from pathlib import Path

import peft
import pytest
import torch
from conftest import TINY_RUN, HashEncoder, people_of
from tiny import base_of

from mta.bank.bank import Bank
from mta.config import MergeSettings
from mta.data.history import Person
from mta.data.tasks import load_task
from mta.errors import BankError, ConfigError, InputError
from mta.lora.peft import CONFIG
from mta.model.encoders import encode_people
from mta.personalize.merge import Merge, coefficients, merged_factors

TASK = load_task("movielens-rating")
KINDS = {  # settings of PEFT by the person's id
    "ann": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "bob": {"r": 2, "lora_alpha": 7, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "cem": {"r": 4, "lora_alpha": 8, "target_modules": ["up_proj", "q_proj"], "alpha_pattern": {"q_proj": 3}},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of LoRAs that PEFT wrote, and their dense updates: id -> layer -> (O, D), or 0."""
    root, dense = tmp_path_factory.mktemp("loras"), {}
    for seed, (name, settings) in enumerate(KINDS.items()):
        model = peft.get_peft_model(base_of("llama").model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(root / name)
        layers = dict(model.base_model.model.named_modules())
        dense[name] = {
            layer: layers[layer].get_delta_weight("default") if hasattr(layers[layer], "get_delta_weight") else 0.0
            for layer in base_of("llama").targets
        }
    return [root / name for name in KINDS], dense


def imported(out, folders, base=None, **how) -> Bank:
    base = base or base_of("llama")
    return Bank.of_adapters(base, folders, out, task=TASK, run=TINY_RUN, encoder=HashEncoder(), **how)


def check_merge(bank, dense, ids, start=0):
    w = torch.linspace(-0.7, 1.1, len(ids), dtype=torch.float64)
    merge = Merge(torch.arange(start, start + len(ids))[None], w[None])
    found = merged_factors(bank.anchors, merge, MergeSettings(policy="uniform"))
    for layer in found.names:
        expected = sum(share * dense[name][layer] for share, name in zip(w, ids))
        assert (found.delta(layer)[0] - expected).abs().max() < 1e-9, layer


def test_a_merge_of_imported_loras_is_the_sum_of_their_updates(trained, tmp_path):
    folders, dense = trained
    bank = imported(tmp_path / "bank", folders)
    assert (len(bank), bank.anchors.rank, bank.task_lora, bank.calibration) == (3, 4, None, None)
    check_merge(bank, dense, list(KINDS))
    assert bank.settled().merge.policy == "posterior"
    assert imported(tmp_path / "again", folders).hash == bank.hash


def test_loras_of_equal_scale_keep_it(trained, tmp_path):
    folders, dense = trained
    bank = imported(tmp_path / "bank", folders[:1])
    assert bank.anchors.scale == 5 / 3
    check_merge(bank, dense, ["ann"])


def test_items_of_the_loras_people_give_vectors_and_members(trained, tmp_path):
    items = people_of(2, items=5)
    people = [Person("bob", items[0].items), Person("somebody", items[1].items)]
    bank = imported(tmp_path / "bank", trained[0], people=people)
    assert bank.info.items == (0, 5, 0)
    assert torch.equal(bank.vectors[1], encode_people(HashEncoder(), TASK, people[:1], "both")[0])
    assert not bank.vectors[[0, 2]].any()
    assert bank.info.members.artefacts_of("ann") == ["clusters", "anchor"]
    assert bank.info.members.artefacts_of("somebody") == []


def test_without_items_no_anchor_is_near(trained, tmp_path):
    bank = imported(tmp_path / "bank", trained[0])
    similarity = bank.similarity(torch.ones(1, bank.vectors.shape[1]))
    with pytest.raises(ConfigError, match="the bank's anchors have no encodings"):
        coefficients(MergeSettings(policy="similarity", k=2), similarity)
    assert coefficients(MergeSettings(policy="uniform", k=0), similarity).w.tolist() == [pytest.approx([1 / 3] * 3)]


def test_loras_join_a_bank(trained, tmp_path, monkeypatch):
    folders, dense = trained
    first = imported(tmp_path / "first", folders[:1])
    monkeypatch.setattr(Bank, "encoder", lambda *_: HashEncoder())
    both = first.added(base_of("llama"), folders[1:], tmp_path / "both")
    check_merge(both, dense, list(KINDS))
    assert len(Bank.open(tmp_path / "first", base_of("llama"))) == 1  # stays as it is
    assert both.hash != first.hash
    assert [both.info.members.artefacts_of(name) for name in ("ann", "cem")] == [["clusters", "anchor"]] * 2
    with pytest.raises(BankError, match="both exists already"):
        first.added(base_of("llama"), folders[1:], tmp_path / "both")


def test_loras_join_a_bank_with_a_task_lora(trained, tiny, tmp_path, monkeypatch):
    (folders, dense), (base, bank) = trained, tiny
    monkeypatch.setattr(Bank, "encoder", lambda *_: HashEncoder())
    larger = bank.added(base, folders, tmp_path / "larger")
    assert len(larger) == len(bank) + 3
    check_merge(larger, dense, list(KINDS), start=len(bank))
    for layer, pair in bank.task_lora.factors.items():
        assert torch.equal(larger.task_lora.factors[layer].b, pair.b)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}])
def test_what_is_more_than_a_lora_is_refused_and_nothing_is_written(trained, tmp_path, change):
    folders, folder = trained[0], tmp_path / "dora"
    folder.mkdir()
    for file in folders[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | change))
    with pytest.raises(InputError, match=f"dora: {next(iter(change))} is"):
        imported(tmp_path / "bank", [*folders, folder])
    assert not (tmp_path / "bank").exists()


def test_loras_of_another_base_and_equal_names_are_refused(trained, tmp_path):
    folders = trained[0]
    with pytest.raises(InputError, match=r"changes layer '[\w.]+' of \d+ inputs and \d+ outputs; .* has no such layer"):
        imported(tmp_path / "bank", folders, base_of("gpt2"))
    twin = Path(tmp_path, "other", "ann")
    twin.parent.mkdir()
    twin.symlink_to(folders[0])
    with pytest.raises(InputError, match="two folders are called 'ann'"):
        imported(tmp_path / "bank", [*folders, twin])
    with pytest.raises(InputError, match="no adapters were given"):
        imported(tmp_path / "bank", [])
