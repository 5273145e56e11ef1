"""User mistakes: mta prints a message, exits with 1, and writes nothing."""

import errno
import json
import os
import re

import pytest
from world import QUESTION, run, tree
from world import world as world  # the fixture

MISTAKES = {
    "a file that is not there": ("data describe {root}/no.jsonl", "DataError: no such file: "),
    "a folder that holds no people": ("data describe {base}", "DataError: "),
    "workers without --cluster": (
        "personalize {new} --bank {bank} --store {root}/s --workers 2",
        "InputError: --workers and --together need --cluster",
    ),
    "an update that starts over": (
        "personalize {new} --bank {bank} --store {root}/s --update --restart",
        "InputError: --restart was given with --update",
    ),
    "a cluster that does not answer": (
        "personalize {new} --bank {bank} --store {root}/s --cluster 127.0.0.1:1",
        "ClusterError: ",
    ),
    "a seed that has no effect": (
        "evaluate lamp3 --data {new} --out {root}/e run.seed=3",
        "InputError: run.seed has no",
    ),
    "a length where labels are scored": (
        "predict {new} --bank {bank} --store {store} --max-new-tokens 5",
        "InputError: --max-new-tokens has no effect: task 'movielens-rating' has labels",
    ),
    "an unknown task": ("data describe {new} --task lampe3", "TaskError: unknown task 'lampe3'"),
    "an unknown person to show": ("data show {new} {settings} --person eve", "PersonNotFound: no person 'eve' in "),
    "a build of an unknown base": (
        "bank build {members} {settings} --base ./no --out {root}/b",
        "AssetError: no such file or folder: ./no",
    ),
    "a build on a device that is not there": (
        "bank build {members} {settings} --out {root}/b --device toaster",
        "ModelError: device 'toaster' cannot be used",
    ),
    "a bank that is not there": ("bank show {root}/no", "BankNotFound: no bank at {root}/no: bank.json is missing"),
    "personalize with too little memory": (
        "personalize {new} --bank {bank} --store {root}/s memory=1KiB",
        "MemoryBudgetError: one person needs about ",
    ),
    "a question to an unknown person": (
        "generate {question} --person eve --bank {bank} --store {store}",
        "PersonNotFound: no state of 'eve'",
    ),
    "a question as one text where fields are needed": (
        "generate Zorblax --bank {bank} --store {store}",
        "DataError: a question of task 'movielens-rating' needs title, genres; got one text",
    ),
    "an export of an unknown person": (
        "export eve --out {root}/x --bank {bank} --store {store}",
        "PersonNotFound: no state of 'eve'",
    ),
    "an export into a file": (
        "export new-00-quispe --out {new} --bank {bank} --store {store}",
        "InputError: {new} cannot be written: {new} is not a writable folder",
    ),
    "a comparison on the bank's own people": (
        "compare {members} --bank {bank} --out {root}/r shots=2 queries=2",
        "InputError: none of 18 people can be tested",
    ),
    "an experiment on people who train": (
        "evaluate movielens --out {root}/e --on training",
        "InputError: --on is 'training'; expected test or development",
    ),
    "an experiment on a file of people": ("evaluate {new} --out {root}/r", "ConfigError: no recipe '{new}'"),
    "a question with half of a surrogate pair": (
        "generate Great-\ud83d --bank {bank} --store {store}",
        "DataError: the question's field 'question': holds half of a surrogate pair",
    ),
    "a question of ten thousand objects in each other": (
        "generate " + '{{"a":' * 10_000 + " --bank {bank} --store {store}",
        "DataError: a question of task 'movielens-rating' needs title, genres; got one text",
    ),
    "a question and a setting of the merge": (
        "generate {question} --bank {bank} --store {store} merge.policy=uniform",
        "ConfigError: 'merge' cannot be changed here",
    ),
    "an export to where nothing can be written": (
        "export new-00-quispe --bank {bank} --store {store} --out /proc/adapter",
        "InputError: /proc/adapter cannot be written: /proc is not a writable folder",
    ),
    "forgetting with a bank and without": (
        "forget ann --bank {bank} --no-bank --store {store}",
        "InputError: --bank and --no-bank exclude each other",
    ),
    "forgetting in a store that is not there": (
        "forget ann --bank {bank} --store {root}/s",
        "StoreError: there is no store at {root}/s",
    ),
    "a store without an address": (
        "personalize {new} --bank {bank} --store=",
        "StoreError: the store's address is empty",
    ),
    "a store whose name fsspec would split": (
        "personalize {new} --bank {bank} --store a::b",
        "StoreError: the folder 'a::b' has '::' in its name",
    ),
    "a new key in a file that exists": (
        "serve --keys {root}/keys.yaml --new-key app --secret {new}",
        "ConfigError: {new} exists already, and may hold another key",
    ),
    "a file for no new key": (
        "serve --keys {root}/keys.yaml --secret {root}/key",
        "ConfigError: --secret needs --new-key",
    ),
    "a report into what it reports on": (
        "report {bank} --out {root}",
        "DataError: the report of {bank} would be written into that folder",
    ),
    "a recipe that is not there": ("demo --data no --out {root}/d", "ConfigError: no recipe 'no'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_and_nothing_is_written(world, mistake):
    text, message = MISTAKES[mistake]
    names = {name: getattr(world, name) for name in ("root", "base", "members", "new", "bank", "store")}
    names |= {"settings": " ".join(map(str, world.settings)), "question": QUESTION.replace(" ", "")}
    before = tree(world.root)
    said = run(*text.format(**names).split())
    assert said.code == 1
    assert re.search(f"^{re.escape(message.format(**names))}", said.err, re.MULTILINE), said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    assert tree(world.root) == before


@pytest.mark.parametrize(
    "command",
    [
        "personalize {new} --bank {bank} --store {out}",
        "export new-00-quispe --bank {bank} --store {store} --out {out}",
        "bank build {members} {settings} --out {out}",
    ],
)
def test_a_full_disk_is_one_line_and_leaves_no_half_written_file(world, tmp_path, monkeypatch, command):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    names = {name: getattr(world, name) for name in ("members", "new", "bank", "store")}
    names |= {"settings": " ".join(map(str, world.settings)), "out": tmp_path / "out"}
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        said = run(*command.format(**names).split())
    assert said.code == 1
    assert "No space left on device" in said.err
    assert "Traceback" not in said.err
    assert [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".safetensors", ".json")] == []
    assert run(*command.format(**names).split()).code == 0  # the same command goes on, once there is room


def test_true_answers_must_be_labels(tmp_path):
    for name, answers in (("true.json", ["4", "I think 4"]), ("mine.json", ["4", "5"])):
        golds = [{"id": str(n), "output": answer} for n, answer in enumerate(answers)]
        (tmp_path / name).write_text(json.dumps({"task": "LaMP_3", "golds": golds}))
    said = run("score", tmp_path / "mine.json", "--true", tmp_path / "true.json", "--task", "lamp3")
    assert (said.code, "'I think 4' is no label of task 'lamp3'" in said.err) == (1, True), said.err
    said = run("score", tmp_path / "true.json", "--true", tmp_path / "mine.json", "--task", "lamp3")
    assert (said.code, said.out[:3]) == (0, "MAE"), said.err


@pytest.mark.parametrize("words", ["predict . --out a.jsonl", "bank build . {settings} --out b --skip-bad bad.jsonl"])
def test_a_working_folder_without_a_file_to_read_is_a_mistake(world, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    words = words.format(settings=" ".join(map(str, world.settings))).split()
    said = run(*words, *(["--bank", world.bank] if words[0] == "predict" else []))
    assert said.code == 1
    assert said.err.startswith("DataError: ")
    assert not [*tmp_path.iterdir()]
