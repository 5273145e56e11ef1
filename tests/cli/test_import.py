"""LoRAs that exist already become a bank, on the command line."""

import json

import pytest
import torch
from tiny import base_of, random_loras, save_base
from world import TASK, mta, ratings, run, written

from mta.lora.peft import write_peft

LORAS = ("ann", "bob", "cem")


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    root = tmp_path_factory.mktemp("loras")
    save_base(root / "base")
    drawn = random_loras(base_of("llama", torch.float32), 3)
    for n, name in enumerate(LORAS):
        write_peft(root / name, drawn.select([n]), "base")
    settings = ["encoder: base", "dtype: float32", "max_tokens: 400", "memory: 64MiB", "calibration: {shots: 2}"]
    (root / "run.yaml").write_text("\n".join(settings))
    written(root / "people.jsonl", [*ratings("other", "hoxha", 9), *ratings("ann", "quispe", 1)])
    return root


def test_loras_become_a_bank_that_personalizes(loras, tmp_path, monkeypatch):
    """The LoRAs' names are the only link to people: cem's may be somebody's in the file, unless the user knows."""
    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "cache"))
    rows = (loras / "people.jsonl").read_text().replace('"person"', '"user"')
    (loras / "others.jsonl").write_text(f"{rows}not JSON\n")
    how = ["--base", loras / "base", "--config", loras / "run.yaml", *TASK, "--out", tmp_path / "bank", "--json"]
    columns = ["--columns", "person=user", "--skip-bad", tmp_path / "bad.jsonl"]
    made = mta("bank", "import", *(loras / n for n in LORAS), *how, "--people", loras / "others.jsonl", *columns).json
    assert (made["anchors"], made["calibration"]) == (3, None)
    calibrate = ["bank", "calibrate", tmp_path / "bank", loras / "people.jsonl", "--out", tmp_path / "next"]
    refused = run(*calibrate)
    assert refused.code == 1
    assert "3 of 3 imported LoRAs have the name of none of the 10" in refused.err
    assert "--unrelated" in refused.err
    assert mta(*calibrate, "--unrelated", "--json").json["calibration"]["people"] == 10
    card = mta("bank", "show", tmp_path / "next").out
    assert "whose ids are not names of imported LoRAs" in card
    assert "the bank was not trained on" not in card
    assert "The bank has no task LoRA: part of a gain can be the form of an answer" in card
    new = written(tmp_path / "new.jsonl", ratings("new", "quispe", 2))
    at = ["--bank", tmp_path / "next", "--store", tmp_path / "people"]
    assert mta("personalize", new, *at, "--json").json["failed"] == {}
    assert "3 anchors" in mta("person", "show", "new-00-quispe", *at).out

    # An export holds the task LoRA, which a merge of several exports would count several times.
    mta("export", "new-00-quispe", *at, "--out", tmp_path / "whole")
    (tmp_path / "whole" / "README.md").unlink()
    said = run("bank", "import", loras / "ann", tmp_path / "whole", *how[:-3], "--out", tmp_path / "other")
    assert said.code == 1
    assert "whole is an export of mta" in said.err
    assert not (tmp_path / "other").exists()


def test_with_the_people_of_all_loras_nothing_needs_to_be_confirmed(loras, tmp_path, monkeypatch):
    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "cache"))
    named = [{**row, "person": name} for name in LORAS for row in ratings("new", "quispe", 1)]
    rows = [*(json.loads(line) for line in (loras / "people.jsonl").read_text().splitlines()), *named]
    how = ["--base", loras / "base", "--config", loras / "run.yaml", *TASK, "--out", tmp_path / "bank", "--json"]
    people = written(tmp_path / "all.jsonl", rows)
    mta("bank", "import", *(loras / name for name in LORAS), *how)
    made = mta("bank", "calibrate", tmp_path / "bank", people, "--out", tmp_path / "next", "--json").json
    assert made["calibration"]["people"] == 10


def test_mistakes_are_named_and_nothing_is_written(loras, tmp_path, monkeypatch):
    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "cache"))
    how = ["--base", loras / "base", "--config", loras / "run.yaml", *TASK, "--out", tmp_path / "bank"]
    said = run("bank", "import", loras / "nobody", *how)
    assert said.code == 1
    assert "nobody is not a PEFT folder" in said.err
    said = run("bank", "import", loras / "ann", *how, "--columns", "time=day")
    assert said.err.startswith("InputError: --skip-bad and --columns need --people")
    assert not (tmp_path / "bank").exists()
