"""``mta bank publish`` and a hub id as ``--bank``: what is printed, confirmed and sent."""

import io
import shutil
import sys

import pytest
from hub import hub
from world import ANN, QUESTION, mta, run, tree
from world import world as world  # the fixture

__all__ = ["hub"]  # a fixture
NAME = "somebody/bank"
SENT = {"README.md", "anchors.safetensors", "bank.json", "calibration.safetensors", "index.safetensors"} | {
    f"task_lora/adapter_{name}" for name in ("config.json", "model.safetensors")
}


@pytest.fixture
def answers(monkeypatch):
    """Return a function that sets the answer of a user at a terminal."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def given(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", Terminal(f"{text}\n"))

    return given


def test_a_dry_run_shows_everything_and_sends_nothing(world, hub):
    before = tree(world.root)
    said = mta("bank", "publish", world.bank, "--to", NAME, "--dry-run")
    assert said.out.startswith(f"To {NAME}, private: 7 files, ")
    assert all(f"  {name}\n" in said.out for name in SENT)
    assert "\nmembers: not sent (members.json): " in said.out
    assert str(world.root) not in said.out
    assert "PUBLIC" in mta("bank", "publish", world.bank, "--to", NAME, "--dry-run", "--public").out
    result = mta("bank", "publish", world.bank, "--to", NAME, "--dry-run", "--json").json
    assert set(result["files"]) == SENT
    assert (result["to"], result["private"]) == (NAME, True)
    assert hub.requests == []
    assert tree(world.root) == before


def test_without_a_terminal_nothing_is_sent_without_yes(world, hub):
    said = run("bank", "publish", world.bank, "--to", NAME)
    assert said.code == 1
    assert f"To {NAME}, private: 7 files, " in said.err
    assert said.err.endswith(
        "so mta cannot ask for confirmation\n  Read the list above, then repeat the command with --yes.\n"
    )
    assert hub.requests == []


def test_a_no_sends_nothing_and_a_yes_sends(world, hub, tmp_path, answers):
    at = world.copy(tmp_path)
    answers("n")
    assert run("bank", "publish", at[1], "--to", NAME).code == 1
    assert hub.requests == []
    answers("y")
    assert mta("bank", "publish", at[1], "--to", NAME).out == f"{hub.endpoint}/{NAME}\n"
    assert set(hub.repos[NAME].files) == SENT


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
    said = run("attack", world.members, base, "--bank", NAME)
    assert "InputError: this bank came without its members: the people it was trained on are unknown\n" in said.err


def test_a_bank_that_is_neither_a_folder_nor_on_the_hub_is_an_error(world, hub):
    said = run("generate", QUESTION, "--bank", "nobody/nothing")
    assert said.err.startswith("HubError: there is no 'nobody/nothing' on the hub, or it is private\n")


def test_forget_names_where_the_bank_was_published(world, hub, tmp_path):
    at = world.copy(tmp_path)
    mta("bank", "publish", at[1], "--to", NAME, "--yes")
    said = mta("forget", "member-03-hoxha", *at).out
    assert f"the bank was published; delete it there by hand: {hub.endpoint}/{NAME}\n" in said
    again = run("bank", "publish", at[1], "--to", NAME, "--dry-run")
    assert again.err.startswith("BankError: a forgotten person is in the ")


def test_a_local_folder_takes_precedence_over_a_hub_id(world, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world.bank, NAME)
    mta("bank", "show", NAME)
    assert hub.requests == []
