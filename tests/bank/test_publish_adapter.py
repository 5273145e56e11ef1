"""Publish and download adapters with the real client of the hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import personalizer
from damage import BASE
from damage import folder as folder  # the fixture
from hub import hub as hub  # the fixture
from huggingface_hub import ModelCard
from publishing import NAME, NEW, refused
from publishing import bank as bank  # the fixtures
from publishing import logged_out as logged_out
from tiny import base_of
from transformers import AutoModelForCausalLM

from mta.errors import HubError, InputError


@pytest.fixture
def adapter(bank, tmp_path):
    """A Personalizer with a store, who has exported x0."""
    personal = personalizer(BASE, bank, tmp_path / "people")
    personal.personalize(NEW)
    personal.export("x0", tmp_path / "x0-adapter")
    return personal, tmp_path / "x0-adapter"


def test_an_export_has_a_card_that_says_nothing_of_the_person(adapter):
    _, out = adapter
    text = (out / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "text-generation")
    assert "a merge of " in text
    assert "a stack of rank 1, exactly" in text
    assert not any(telling in text for telling in ("x0", "Film", str(out.parent)))


def test_an_adapter_that_was_pushed_is_loaded_by_peft(hub, adapter, tmp_path):
    personal, out = adapter
    assert personal.push_to_hub("x0", out, "somebody/one") == f"{hub.endpoint}/somebody/one"
    repo = hub.repos["somebody/one"]
    assert repo.private
    assert sorted(repo.files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    base_of(dtype=torch.float32).model.save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    ids = torch.tensor([[5, 9, 33, 80]])
    before = plain(ids).logits
    there = peft.PeftModel.from_pretrained(plain, "somebody/one")(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    here = peft.PeftModel.from_pretrained(plain, out)(ids).logits
    assert torch.equal(there, here)
    assert not torch.allclose(there, before)


def test_forgetting_names_a_pushed_adapter_and_removes_the_one_here(hub, adapter):
    personal, out = adapter
    personal.push_to_hub("x0", out, "somebody/one")
    personal.push_to_hub("x0", out, "somebody/one")
    found = personal.forget("x0")
    assert found.exports_left == [f"{hub.endpoint}/somebody/one (pushed there: delete it by hand)"]
    assert not out.exists()


def test_a_push_that_is_refused_notes_nothing_and_sends_nothing(hub, adapter, logged_out):
    personal, out = adapter
    assert "the hub denies access to" in refused(HubError, personal.push_to_hub, "x0", out, "somebody/one")
    assert personal.forget("x0").exports_left == []


def test_another_persons_adapter_in_the_same_folder_is_not_pushed(hub, adapter):
    personal, out = adapter
    shutil.rmtree(out)
    personal.export("x1", out)
    said = refused(InputError, personal.push_to_hub, "x0", out, "somebody/one")
    assert said.startswith(f"no adapter of that person was exported to {out}")
    assert hub.requests == []


def test_a_card_that_is_not_ours_is_neither_replaced_nor_pushed_nor_removed(hub, adapter):
    personal, out = adapter
    (out / "README.md").write_text("about my friend")
    personal.export("x0", out)
    assert (out / "README.md").read_text() == "about my friend"
    said = refused(InputError, personal.push_to_hub, "x0", out, "somebody/one")
    assert said.startswith(f"{out} has no card from mta export")
    assert hub.requests == []
    personal.forget("x0")
    assert [path.name for path in out.iterdir()] == ["README.md"]


def test_a_base_in_a_folder_here_is_pushed_by_its_name(hub, adapter, tmp_path):
    personal, out = adapter
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": f"{tmp_path}/mine"}))
    personal.push_to_hub("x0", out, "somebody/one")
    assert json.loads(hub.repos["somebody/one"].files["adapter_config.json"])["base_model_name_or_path"] == "mine"
    assert str(tmp_path).encode() not in hub.arrived()


@pytest.mark.slow
def test_in_a_process_of_its_own_as_people_have_it(hub, bank, tmp_path, cache):
    """A new process with the hub client configured by environment variables."""
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]; from tiny import base_of; from mta.bank.bank import Bank; "
        f"base = base_of(); bank = Bank.open(sys.argv[1], base); bank.push_to_hub({NAME!r}); "
        f"print(Bank.from_pretrained({NAME!r}, base).hash)"
    )
    places = [str(bank.folder), str(Path(__file__).parents[1])]
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    own |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}  # this hub is on this machine
    done = subprocess.run([sys.executable, "-c", code, *places], capture_output=True, text=True, env=os.environ | own)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == bank.hash
