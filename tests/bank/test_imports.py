"""Banks of LoRAs that exist already: their merges are those of PEFT."""

from pathlib import Path

import peft
import pytest
import torch
from conftest import TINY_RUN, HashEncoder, people_of
from tiny import base_of

from mta.bank.bank import Bank
from mta.bank.card import card
from mta.bank.notes import mark_stale, stale_report
from mta.config import CompareSettings, MergeSettings
from mta.data.history import Person
from mta.data.tasks import load_task
from mta.errors import ConfigError, InputError
from mta.evaluation.compare import standard_methods
from mta.evaluation.methods import Merged
from mta.model.encoders import encode_people
from mta.personalize.merge import Merge, coefficients, merge_loras

TASK = load_task("movielens-rating")
KINDS = {  # settings of PEFT by the person's id
    "ann": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "bob": {"r": 2, "lora_alpha": 7, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "cem": {"r": 4, "lora_alpha": 8, "target_modules": ["up_proj", "q_proj"], "alpha_pattern": {"q_proj": 3}},
    "dan": {"r": 1, "lora_alpha": 2, "target_modules": ["down_proj", "o_proj"]},
    "eva": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "rank_pattern": {"k_proj": 3}},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of LoRAs that PEFT trained and wrote, and their dense updates: id -> layer -> (O, D), or 0."""
    root, dense = tmp_path_factory.mktemp("loras"), {}
    for (name, settings), person in zip(KINDS.items(), people_of(len(KINDS))):
        base = base_of("llama")
        model = peft.get_peft_model(base.model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).double()
        losses = list(train(model, base, person))
        assert losses[-1] < losses[0]
        model.save_pretrained(root / name)
        layers = dict(model.base_model.model.named_modules())
        dense[name] = {
            layer: layers[layer].get_delta_weight("default") if hasattr(layers[layer], "get_delta_weight") else 0.0
            for layer in base_of("llama").targets
        }
    return [root / name for name in KINDS], dense


def train(model, base, person):
    """Train a model of PEFT on a person's items, with torch alone; yield the loss before every step."""
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    examples = [base.prompts.example(TASK, item) for item in person.items]
    for _ in range(8):
        whole = 0.0
        for example in examples:
            tokens = torch.tensor([example.tokens])
            labels = tokens.clone()
            labels[:, : example.target_start] = -100
            loss = model(input_ids=tokens, labels=labels).loss
            loss.backward()
            whole += loss.item()
        adam.step()
        adam.zero_grad()
        yield whole


def imported(out, folders, base=None, **how) -> Bank:
    base = base or base_of("llama")
    return Bank.of_adapters(base, folders, out, task=TASK, run=TINY_RUN, encoder=HashEncoder(), **how)


def check_merge(bank, dense, ids, start=0):
    w = torch.linspace(-0.7, 1.1, len(ids), dtype=torch.float64)
    merge = Merge(torch.arange(start, start + len(ids))[None], w[None])
    found = merge_loras(bank.anchors, merge)
    for layer in found.names:
        expected = sum(share * dense[name][layer] for share, name in zip(w, ids))
        assert (found.delta(layer)[0] - expected).abs().max() < 1e-9, layer


def test_a_merge_of_imported_loras_is_the_sum_of_their_updates(trained, tmp_path):
    folders, dense = trained
    bank = imported(tmp_path / "bank", folders)
    assert (len(bank), bank.anchors.rank, bank.task_lora, bank.calibration) == (5, 4, None, None)
    check_merge(bank, dense, list(KINDS))
    assert bank.with_calibrated_settings().merge.policy == "posterior"
    again = imported(tmp_path / "again", folders[::-1])
    assert torch.equal(again.anchors.delta(bank.anchors.names[0]), bank.anchors.delta(bank.anchors.names[0]))
    assert again.info.members.hashed.key != bank.info.members.hashed.key  # nobody can derive it


def test_items_of_the_loras_people_give_vectors_and_members(trained, tmp_path):
    items = people_of(2, items=5)
    people = [Person("bob", items[0].items), Person("somebody", items[1].items)]
    bank = imported(tmp_path / "bank", trained[0], people=people)
    assert bank.info.items == (0, 5, 0, 0, 0)
    assert torch.equal(bank.vectors[1], encode_people(HashEncoder(), TASK, people[:1], "both")[0])
    assert not bank.vectors[[0, 2, 3, 4]].any()
    assert bank.info.members.parts_of("ann") == ["clusters", "anchor"]
    assert bank.info.members.parts_of("somebody") == []


@pytest.mark.parametrize("policy", ["similarity", "released", "top1", "fixed", "uniform"])
@pytest.mark.parametrize("k", [0, 2])
def test_without_items_no_anchor_is_near(trained, tmp_path, policy, k):
    bank = imported(tmp_path / "bank", trained[0])
    similarity = bank.similarity(torch.ones(1, bank.vectors.shape[1]))
    if (policy, k) != ("uniform", 0):
        with pytest.raises(ConfigError, match="the bank's anchors have no encodings"):
            coefficients(MergeSettings(policy=policy, k=k), similarity)
    assert coefficients(MergeSettings(policy="uniform", k=0), similarity).w.tolist() == [pytest.approx([1 / 5] * 5)]


def test_an_imported_bank_without_items_compares_only_merges_of_all(trained, tmp_path):
    methods = standard_methods(TINY_RUN, CompareSettings(), TASK, 3, calibrated=False, encoded=False)
    policies = [method.merge.policy for method in methods if isinstance(method, Merged)]
    assert set(policies) == {"posterior"}
    assert "trained elsewhere" in card(imported(tmp_path / "bank", trained[0]).info)


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


def test_a_bank_with_the_lora_of_a_forgotten_person_is_imported_anew(trained, tmp_path):
    bank = imported(tmp_path / "bank", trained[0])
    mark_stale(bank.folder, "ann")
    assert "mta bank import --out NEW" in stale_report(bank.folder).hint
