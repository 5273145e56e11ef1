"""``mta bank publish`` and a hub id as ``--bank``: what is printed and sent."""

from hub import hub
from world import ANN, MEMBER, QUESTION, mta, run, tree
from world import world as world  # the fixture

__all__ = ["hub"]  # a fixture
NAME = "somebody/bank"
SENT = {"README.md", "anchors.safetensors", "bank.json", "calibration.safetensors", "index.safetensors"} | {
    f"task_lora/adapter_{name}" for name in ("config.json", "model.safetensors")
}


def test_without_yes_everything_is_listed_and_nothing_is_sent(world, hub):
    before = tree(world.root)
    said = mta("bank", "publish", world.bank, "--to", NAME)
    assert said.out.startswith(f"To {NAME}, private: 7 files, ")
    assert all(f"  {name}\n" in said.out for name in SENT)
    assert "\nmembers: not sent (members.json): " in said.out
    assert str(world.root) not in said.out
    assert "PUBLIC" in mta("bank", "publish", world.bank, "--to", NAME, "--public").out
    result = mta("bank", "publish", world.bank, "--to", NAME, "--json").json
    assert set(result["files"]) == SENT
    assert (result["to"], result["private"]) == (NAME, True)
    assert said.out.endswith("Nothing was sent. To send this, add  --yes\n")
    assert hub.requests == []
    assert tree(world.root) == before


def test_a_published_bank_is_used_by_its_hub_id(world, hub, tmp_path):
    at = world.copy(tmp_path)
    result = mta("bank", "publish", at[1], "--to", NAME, "--yes", "--json").json
    assert (result["url"], set(result["files"])) == (f"{hub.endpoint}/{NAME}", SENT)
    assert str(world.root).encode() not in hub.arrived()
    named = ["--bank", NAME, "--store", at[3]]
    base = f"base={world.base}"  # the published bank does not name the local path
    assert mta("bank", "show", NAME).out.startswith("# A bank of 2 anchors")
    ours = mta("generate", QUESTION, "--person", ANN, *at, "--json").json
    assert mta("generate", QUESTION, base, "--person", ANN, *named, "--json").json == ours
    new = tmp_path / "new"
    said = mta("personalize", world.new, base, "--bank", NAME, "--store", new)
    assert "This bank came without its members: these people may have helped to train it." in said.err
    assert "that were trained on them: not known" in mta("person", "show", ANN, "--bank", NAME, "--store", new).out
    assert "came without its members" in mta("forget", ANN, "--bank", NAME, "--store", new).out
    assert f"published; delete it there by hand: {hub.endpoint}/{NAME}\n" in mta("forget", MEMBER, *at).out
    said = run("attack", world.members, base, "--bank", NAME)
    assert "InputError: this bank came without its members: the people it was trained on are unknown\n" in said.err
