"""LoRAs that exist already become a bank, on the command line."""

import shutil

import pytest
import torch
from tiny import base_of, random_loras
from world import TASK, mta, ratings, run, saved_base, written

from mta.bank.notes import stop_calibration
from mta.lora.peft import write_peft


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    root = tmp_path_factory.mktemp("loras")
    saved_base(root / "base")
    drawn = random_loras(base_of("llama", torch.float32), 3)
    for n, name in enumerate(("ann", "bob", "cem")):
        write_peft(root / name, drawn.select([n]), "base")
    settings = ["encoder: base", "dtype: float32", "max_tokens: 400", "memory: 64MiB", "calibration: {shots: 2}"]
    (root / "run.yaml").write_text("\n".join(settings))
    written(root / "people.jsonl", [*ratings("other", "hoxha", 9), *ratings("ann", "quispe", 1)])
    return root


def test_loras_become_a_bank_that_grows_and_personalizes(loras, tmp_path, monkeypatch):
    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "cache"))
    how = ["--base", loras / "base", "--config", loras / "run.yaml", *TASK]
    made = mta("bank", "import", loras / "ann", loras / "bob", *how, "--out", tmp_path / "bank", "--json").json
    assert (made["anchors"], made["calibration"]) == (2, None)
    rows = (loras / "people.jsonl").read_text().replace('"person"', '"user"')
    (loras / "others.jsonl").write_text(f"{rows}not JSON\n")
    people = ["--people", loras / "others.jsonl", "--person-column", "user", "--skip-bad", tmp_path / "bad.jsonl"]
    grown = mta("bank", "add", tmp_path / "bank", loras / "cem", "--out", tmp_path / "more", *people, "--json").json
    assert (grown["anchors"], grown["calibration"]["people"]) == (3, 10)
    new = written(tmp_path / "new.jsonl", ratings("new", "quispe", 2))
    at = ["--bank", tmp_path / "more", "--store", tmp_path / "people"]
    assert mta("personalize", new, *at, "--json").json["failed"] == {}
    assert "3 anchors" in mta("person", "show", "new-00-quispe", *at).out


def test_an_interrupted_calibration_names_the_command_that_goes_on(loras, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mta.Bank.calibrate", interrupted)
    how = ["--base", loras / "base", "--config", loras / "run.yaml", *TASK, "--people", loras / "people.jsonl"]
    said = run("bank", "import", loras / "ann", loras / "bob", *how, "--out", tmp_path / "bank")
    assert said.code == 130
    assert f"mta bank calibrate {tmp_path}/bank" in said.err
    assert "repeat the command" not in said.err
    assert mta("bank", "show", tmp_path / "bank", "--json").json["calibration"] is None


def test_a_person_forgotten_during_an_interrupted_calibration_is_named(loras, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        stop_calibration(tmp_path / "bank")
        raise KeyboardInterrupt

    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "cache"))
    how = ["--base", loras / "base", "--config", loras / "run.yaml", *TASK]
    mta("bank", "import", loras / "ann", loras / "bob", *how, "--out", tmp_path / "bank")
    monkeypatch.setattr("mta.Bank.calibrate", interrupted)
    words = ["bank", "add", tmp_path / "bank", loras / "cem", "--people", loras / "people.jsonl"]
    said = run(*words, "--out", tmp_path / "more")
    assert said.code == 1
    assert "a person was forgotten" in said.err


def test_a_bank_grows_where_its_base_was_moved(loras, tmp_path, monkeypatch):
    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "cache"))
    moved = shutil.copytree(loras / "base", tmp_path / "base")
    how = ["--base", moved, "--config", loras / "run.yaml", *TASK]
    mta("bank", "import", loras / "ann", *how, "--out", tmp_path / "bank")
    moved.rename(tmp_path / "elsewhere")
    words = ["bank", "add", tmp_path / "bank", loras / "cem"]
    assert run(*words, "--out", tmp_path / "no").code == 1
    mta(*words, "--base", tmp_path / "elsewhere", "--out", tmp_path / "more")


def test_mistakes_are_named_and_nothing_is_written(loras, tmp_path, monkeypatch):
    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "cache"))
    how = ["--base", loras / "base", "--config", loras / "run.yaml", *TASK, "--out", tmp_path / "bank"]
    said = run("bank", "import", loras / "nobody", *how)
    assert said.code == 1
    assert "nobody is not a PEFT folder" in said.err
    said = run("bank", "import", loras / "ann", *how, "--time-column", "day")
    assert said.err.startswith("InputError: --skip-bad and names of columns need --people")
    assert not (tmp_path / "bank").exists()
