"""Publish and download banks with the hub's real client: files sent, kept local, and downloaded."""

import json
import shutil
from itertools import chain
from pathlib import Path

import hub as stand_in
import pytest
import torch
import yaml
from conftest import personalizer
from damage import BASE, HASHED, rewritten
from damage import folder as folder  # the fixture
from hub import hub as hub  # the fixture
from huggingface_hub import ModelCard, constants
from publishing import NAME, NEW, refused
from publishing import bank as bank  # the fixtures
from publishing import logged_out as logged_out

from mta.bank.bank import Bank
from mta.bank.format import INFO, file_hashes, read_info
from mta.bank.notes import mark_stale, published
from mta.bank.publish import bank_folder, bank_upload, publish_bank
from mta.config import Run
from mta.errors import AssetError, BankCorrupt, BankError, BankNotFound, HubError
from mta.personalize import forget_person
from mta.store import Store
from mta.system.hub import local_folder

SENT = sorted(["README.md", "bank.json", *HASHED])
ROWS = [("x0", {"title": "Film 3", "genres": "Drama"}), ("x1", {"title": "Film 8", "genres": "Comedy"})]


# -- there and back ----------------------------------------------------------------------------------------------------


def test_a_bank_that_was_pushed_comes_back_the_same_and_answers_the_same(hub, bank):
    assert bank.push_to_hub(NAME) == f"{hub.endpoint}/{NAME}"
    assert hub.repos[NAME].private
    assert sorted(hub.repos[NAME].files) == SENT
    assert hub.repos[NAME].files["bank.json"] == (bank.folder / "bank.json").read_bytes()

    back = Bank.from_pretrained(NAME, BASE)
    assert back.hash == bank.hash
    assert back.info.members.hashed is None
    assert all(torch.equal(a, b) for a, b in zip(back.anchors.tensors().values(), bank.anchors.tensors().values()))
    here, there = personalizer(BASE, bank), personalizer(BASE, back)
    here.personalize(NEW)
    there.personalize(NEW)
    assert there.generate(ROWS, max_new_tokens=8) == here.generate(ROWS, max_new_tokens=8)
    assert there.state("x0").to_bytes() == here.state("x0").to_bytes()


def test_nothing_of_the_members_arrives(hub, bank):
    hashed = bank.info.members.hashed
    bank.push_to_hub(NAME)
    arrived = hub.arrived()
    assert bank.hash.encode() in arrived
    for secret in (hashed.key, *hashed.task, *hashed.candidates, *chain(*hashed.anchors)):
        assert secret.encode() not in arrived


def test_nothing_but_the_banks_own_files_arrives(hub, bank):
    for name in ("run.json", "config.yaml", "work/task.done", ".secret", "task_lora/optimizer.pt", "notes.md"):
        (bank.folder / name).parent.mkdir(exist_ok=True)
        (bank.folder / name).write_text("Xylograd")
    bank.push_to_hub(NAME)
    assert sorted(hub.repos[NAME].files) == SENT
    assert b"Xylograd" not in hub.arrived()
    assert b'"stage"' not in hub.arrived()  # metrics.jsonl


def test_a_publication_removes_our_files_of_an_earlier_one_alone(hub, bank):
    bank.push_to_hub(NAME)
    first = hub.repos[NAME].heads["main"]
    hub.repos[NAME].files["LICENSE"] = b"theirs"
    files = {name: digest for name, digest in bank.info.files.items() if name != "calibration.safetensors"}
    rewritten(bank.folder, calibration=None, files=files)
    bank.push_to_hub(NAME)
    assert sorted(hub.repos[NAME].files) == sorted(["LICENSE", "README.md", "bank.json", *files])
    assert Bank.from_pretrained(NAME, BASE).calibration is None
    assert Bank.from_pretrained(NAME, BASE, revision=first).calibration is not None


def test_a_place_of_this_machine_stays_here(hub, folder, tmp_path):
    """A base and an encoder in folders: their names are all that others learn, in every file."""
    place = str(tmp_path / "models" / "mine")
    run = json.loads((folder / "bank.json").read_text())["run"] | {"base": place, "encoder": place}
    adapter = folder / "task_lora" / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": place}))
    rewritten(folder, base=place, encoder=place, run=run, files=file_hashes(folder, read_info(folder).files))
    bank = Bank.open(folder, BASE)
    bank.push_to_hub(NAME)
    assert str(tmp_path).encode() not in hub.arrived()
    back = Bank.from_pretrained(NAME, BASE)
    assert (back.hash, back.info.base, back.info.run.base, back.info.encoder) == (bank.hash, *["mine"] * 3)
    assert "base_model:" not in hub.repos[NAME].files["README.md"].decode()


def test_a_folder_that_exists_wins(hub, bank, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bank.folder, NAME)
    assert Bank.from_pretrained(NAME, BASE).folder == Path(NAME)
    assert Bank.from_pretrained(bank.folder, BASE).hash == bank.hash
    assert hub.requests == []


def test_only_the_files_of_a_bank_are_fetched(hub, bank):
    bank.push_to_hub(NAME)
    hub.repos[NAME].files.update({"huge.safetensors": b"0" * 1000, "evil.pkl": b"pickle"})
    hub.requests.clear()
    folder = Bank.from_pretrained(NAME, BASE).folder
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == SENT
    assert not any(path.endswith(("huge.safetensors", "evil.pkl")) for _, path in hub.requests)


# -- refused -----------------------------------------------------------------------------------------------------------


def test_a_bank_with_a_forgotten_person_is_not_published(hub, bank):
    mark_stale(bank.folder, "t2")
    said = refused(BankError, bank.push_to_hub, NAME)
    assert said.startswith("a forgotten person is in the task LoRA of ")
    assert said.endswith("\n  Leave that person out, and make it anew:  mta bank build --out NEW")
    assert hub.requests == []


def test_a_bank_whose_person_is_forgotten_before_it_is_sent_is_not_published(hub, bank):
    upload = bank_upload(bank.folder, NAME)
    forget_person("t2", None, bank.folder)
    assert "a forgotten person is in" in refused(BankError, publish_bank, bank.folder, NAME, upload)
    assert not any(INFO in repo.files for repo in hub.repos.values())
    assert published(bank.folder) == []


def test_a_damaged_bank_is_not_published(hub, bank):
    (bank.folder / "index.safetensors").write_bytes(b"torn")
    assert "index.safetensors was changed or cut short" in refused(BankCorrupt, bank.push_to_hub, NAME)
    assert hub.requests == []


def test_a_public_repository_is_not_taken_for_a_private_one(hub, bank):
    hub.repos[NAME] = stand_in.Repo(private=False)
    said = refused(HubError, bank.push_to_hub, NAME)
    assert said.startswith(
        f"{NAME} exists and is public, expected a private repository; nothing was sent\n  Give --public"
    )
    assert hub.repos[NAME].files == {}
    assert published(bank.folder) == []
    bank.push_to_hub(NAME, private=False)
    assert sorted(hub.repos[NAME].files) == SENT


def test_without_a_login_nothing_is_sent(hub, bank, logged_out):
    said = refused(HubError, bank.push_to_hub, NAME)
    assert said.startswith(f"the hub denies access to {NAME!r}: ")
    assert said.endswith("\n  Log in:  hf auth login   (or set HF_TOKEN), with an account that has access.")
    assert hub.repos == {}


@pytest.mark.parametrize("name", ["a/b/c", "--", "x" * 100])
def test_a_name_no_repository_can_have_is_refused(hub, bank, name):
    said = refused(HubError, bank.push_to_hub, name)
    assert said.startswith(f"{name!r} is not a repository name: ")
    assert hub.requests == []


def test_a_torn_bank_on_the_hub_is_refused(hub, bank):
    bank.push_to_hub(NAME)
    hub.repos[NAME].commit({name: data[:99] for name, data in hub.repos[NAME].files.items()})
    assert refused(BankCorrupt, Bank.from_pretrained, NAME, BASE).startswith(
        f"the download of {NAME!r} from the hub is damaged: "
    )
    hub.repos[NAME].commit({"bank.json": (bank.folder / "bank.json").read_bytes()})
    assert "is missing" in refused(BankCorrupt, Bank.from_pretrained, NAME, BASE)


def test_a_repository_without_a_bank_is_refused_before_weights_are_downloaded(hub):
    hub.repos[NAME] = stand_in.Repo(private=True)
    hub.repos[NAME].commit({"model.safetensors": b"0" * 1000})
    said = refused(BankNotFound, bank_folder, NAME)
    assert (
        said
        == f"there is no folder {NAME}, and {NAME!r} on the hub is not a bank: it has no bank.json\n  Check the name."
    )
    assert not any("model.safetensors" in path for _, path in hub.requests)


def test_a_refused_login_explains_what_to_do(hub, bank, monkeypatch):
    unknown = refused(HubError, bank_folder, "nobody/nothing")
    assert unknown.startswith(
        "there is no 'nobody/nothing' on the hub, or it is private\n  Check the name. Log in:  hf auth"
    )
    assert "there is no 'nobody/nothing' on the hub, or it is private\n" in refused(
        AssetError, local_folder, "nobody/nothing"
    )
    bank.push_to_hub(NAME)
    assert refused(HubError, bank_folder, NAME, "v9") == (
        f"{NAME!r} has no such revision\n  Give a branch, a tag or a commit it has."
    )
    hub.repos[NAME].gated = True
    assert refused(HubError, bank_folder, NAME).startswith(f"{NAME!r} is gated, and you have no access\n")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = refused(HubError, bank_folder, "nobody/other")
    assert offline.startswith("'nobody/other' cannot be downloaded from the hub, or sent to it: ")
    assert "give the folder" in offline


def test_what_was_fetched_once_opens_without_a_network(hub, bank, monkeypatch):
    bank.push_to_hub(NAME)
    Bank.from_pretrained(NAME, BASE)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Bank.from_pretrained(NAME, BASE).hash == bank.hash
    assert hub.requests == []


# -- what is shown, and the card ---------------------------------------------------------------------------------------


def test_the_parcel_says_what_would_leave_and_sends_nothing(hub, bank):
    upload = bank_upload(bank.folder, NAME)
    assert sorted(upload.sizes()) == SENT
    assert upload.sizes()["anchors.safetensors"] == (bank.folder / "anchors.safetensors").stat().st_size
    assert upload.facts["license"].startswith("none (--license)")
    assert upload.facts["members"].startswith("not sent (members.json): its readers could test")
    assert "7 people behind the task LoRA, 12 candidates, and 3 of them behind anchors" in upload.facts["data"]
    assert hub.requests == []


def test_the_card_is_one_the_hub_reads(hub, bank):
    bank.push_to_hub(NAME, license="apache-2.0")
    text = hub.repos[NAME].files["README.md"].decode()
    data = ModelCard(text).data.to_dict()
    assert (data["license"], data["library_name"]) == ("apache-2.0", "merge-then-adapt")
    assert set(data["tags"]) >= {"lora", "arxiv:2511.20072"}
    assert f'bank = mta.Bank.from_pretrained("{NAME}", base)' in text
    assert "| items per anchor | 4 to 4, " in text
    assert "it is not anonymous" in text
    assert Run.model_validate(yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])) == bank.info.run


def test_the_base_of_a_card_is_its_id_on_the_hub(folder):
    for base, expected in {
        "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "meta-llama/Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
        "tiny-llama": None,
    }.items():
        run = json.loads((folder / "bank.json").read_text())["run"] | {"base": base}
        rewritten(folder, base=base, run=run)
        card = ModelCard(bank_upload(folder, NAME).files["README.md"].decode())
        assert card.data.to_dict().get("base_model") == expected


# -- forgetting --------------------------------------------------------------------------------------------------------


def test_forgetting_names_where_the_bank_was_published(hub, bank, tmp_path):
    bank.push_to_hub(NAME)
    found = forget_person("t2", Store(tmp_path / "people"), bank.folder)
    assert (found.needs_rebuild, found.published, found.unknown) == (["task LoRA"], [f"{hub.endpoint}/{NAME}"], [])
    assert forget_person("stranger", Store(tmp_path / "people"), bank.folder).published == []


def test_forgetting_says_what_a_published_bank_does_not_let_us_know(hub, bank, tmp_path):
    bank.push_to_hub(NAME)
    there = Bank.from_pretrained(NAME, BASE).folder
    found = forget_person("t2", Store(tmp_path / "people"), there)
    assert (found.needs_rebuild, found.unknown) == ([], [str(there)])
