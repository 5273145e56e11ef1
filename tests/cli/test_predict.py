"""``mta predict``: the questions of a file, each answered by its person's model."""

import json
import math
import stat
from dataclasses import replace
from shutil import copytree

import pytest
import torch
from world import ANN, BOB, mta, run, written
from world import world as world  # the fixture

from mta import TASK
from mta.bank.calibration.label_bias import STD, features_of, fitted_bias
from mta.cli.options import open_bank
from mta.data.earlier import in_words
from mta.data.history import PROFILE, Person
from mta.data.readers import read_people
from mta.personalize import Personalizer
from mta.store import Store
from mta.tools import predict as tool

FILMS = ["Zorblax", "Quorn", "Vexil"]


def question(person, film, **more):
    return {"person": person, "title": film, "genres": "Drama", **more}


@pytest.fixture
def asked(tmp_path):
    """Questions of two people in turn; one row has an answer, which is not read."""
    rows = [question(who, film) for film in FILMS for who in (ANN, BOB)]
    rows[0] |= {"rating": "no label", "id": "first"}
    return written(tmp_path / "questions.jsonl", rows)


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_answers_are_those_of_the_library_one_by_one(world, asked, monkeypatch):
    monkeypatch.setattr(tool, "TOGETHER", 4)
    found = lines(mta("predict", asked, *world.at).out)
    assert [(one["person"], one["question"]["title"]) for one in found] == [(w, f) for w in (ANN, BOB) for f in FILMS]
    assert [one["id"] for one in found] == ["first", *[None] * 5]
    base, bank, settings = open_bank(world.bank)
    personal = Personalizer(base, bank, world.store, run=settings)
    for one in found:
        (shares,) = personal.shares([(one["person"], one["question"])])
        assert one["shares"] == pytest.approx(shares, abs=1e-5)
        assert (one["answer"], one["model"]) == (next(iter(shares)), "person")


def test_a_question_that_is_too_long_is_named_before_anything_is_computed(world, tmp_path, monkeypatch):
    path = written(
        tmp_path / "questions.jsonl", [question(ANN, "Quorn"), question(BOB, "Vexil", genres="Drama " * 4000)]
    )
    monkeypatch.setattr(Personalizer, "shares", stopping(calls=0))
    said = run("predict", path, *world.at)
    assert (said.code, f"a question of {BOB!r}: task 'movielens-rating': instruction" in said.err) == (1, True), (
        said.err
    )


def test_an_interrupted_run_goes_on_with_the_same_answers(world, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "TOGETHER", 2)
    whole, out = mta("predict", asked, *world.at).out, tmp_path / "answers.jsonl"
    monkeypatch.setattr(Personalizer, "shares", stopping(calls=2))
    run("predict", asked, *world.at, "--out", out)
    part = out.with_name("answers.jsonl.unfinished")
    assert not out.exists()
    assert len(part.read_text().splitlines()) == 2
    assert stat.S_IMODE(part.stat().st_mode) == 0o600
    with part.open("a") as file:
        file.write('["half a li')  # as a killed process leaves it

    monkeypatch.setattr(Personalizer, "shares", stopping(calls=1))  # one group of questions is left
    mta("predict", asked, *world.at, "--out", out)
    assert (out.read_text(), part.exists()) == (whole, False)


def test_answers_of_an_older_model_are_not_taken_over(world, asked, tmp_path, monkeypatch):
    base, bank, settings = open_bank(world.bank)
    personal = Personalizer(base, bank, copytree(world.store, tmp_path / "store"), run=settings)
    people = read_people(asked, bank.task, questions=True)
    monkeypatch.setattr(tool, "TOGETHER", 3)

    def answers():
        return [one.shares for one in tool.predict(personal, people, kept=tool.Unfinished(tmp_path / "answers"))]

    before, state = answers(), personal.state(ANN)
    personal.store.save(ANN, replace(state, w=tuple(weight + 1 for weight in state.w), work="f" * 64))
    monkeypatch.setattr(Personalizer, "shares", stopping(calls=1))  # Bob's answers are kept
    after = answers()
    assert before[:3] != after[:3]
    assert before[3:] == after[3:]


def stopping(calls, method=Personalizer.shares):
    """Return ``method`` for so many calls; the next one is interrupted."""

    def answer(*args):
        nonlocal calls
        if not calls:
            raise KeyboardInterrupt
        calls -= 1
        return method(*args)

    return answer


def test_people_without_a_model_are_refused_or_answered_by_the_pooled_model(world, tmp_path):
    path = written(tmp_path / "questions.jsonl", [question(ANN, "Quorn"), question("eve", "Quorn")])
    said = run("predict", path, *world.at, "--out", tmp_path / "answers.jsonl")
    assert (said.code, "1 of 2 people have no model of this bank, 'eve' first" in said.err) == (1, True), said.err
    assert not (tmp_path / "answers.jsonl").exists()
    out = tmp_path / "new" / "answers.jsonl"
    answered = mta("predict", path, *world.at, "--fallback", "task", "--out", out, "--json")
    assert stat.S_IMODE(out.parent.stat().st_mode) == 0o700
    assert answered.json == {"out": str(out), "answers": 2, "people": 2, "fallback": 1}
    assert "1 of 2 people have no model of this bank: the pooled model answers" in answered.err
    missing = run("predict", path, "--bank", world.bank, "--store", tmp_path / "poeple", "--fallback", "task")
    assert (missing.code, "poeple" in missing.err) == (1, True), missing.err
    assert [one["model"] for one in lines(out.read_text())] == ["person", "task"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o600  # it holds people's questions


def test_states_of_another_bank_are_refused_before_anything_is_computed_or_fall_back(world, tmp_path):
    store = world.copy(tmp_path)[3]
    Store(store).save("eve", replace(Store(store).load(ANN), bank="0" * 64, work="other"))
    at = ["--bank", world.bank, "--store", store]
    path = written(tmp_path / "questions.jsonl", [question("eve", "Quorn"), question(ANN, "Quorn")])
    said = run("predict", path, *at)
    assert (said.code, "1 of 2 people have no model of this bank" in said.err) == (1, True), said.err
    assert [one["model"] for one in lines(mta("predict", path, *at, "--fallback", "base").out)] == ["base", "person"]


def test_columns_and_written_answers(world, tmp_path):
    path = tmp_path / "questions.csv"
    path.write_text(f"who,title,genres\n{ANN},Quorn,Drama\n")
    (one,) = lines(mta("predict", path, *world.at, "--columns", "person=who", "--write", "--max-new-tokens", 2).out)
    assert "shares" not in one


def test_answers_in_the_benchmarks_format_can_be_scored(world, tmp_path):
    rows = [question(who, film, id=f"{who} {film}") for who in (ANN, BOB) for film in FILMS]
    path, out, true = written(tmp_path / "questions.jsonl", rows), tmp_path / "mine.json", tmp_path / "outputs.json"
    mta("predict", path, *world.at, "--out", out)
    task = json.loads(out.read_text())["task"]
    true.write_text(json.dumps({"task": task, "golds": [{"id": row["id"], "output": "4"} for row in rows]}))
    said = mta("score", out, "--true", true, "--task", "movielens-rating", "--json").json
    assert (said["questions"], 0 <= said["MAE"] <= 4) == (6, True)


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([{"person": ANN, "title": "Quorn"}], [], "field 'genres': missing"),
        ([question(ANN, "Quorn")], ["--out", "{root}/mine.json"], "some questions have no id"),
        ([question(ANN, "Quorn", id="1")] * 2, ["--out", "{root}/mine.json"], "several questions have the id '1'"),
        ([question(ANN, "Quorn")], ["--out", "{root}"], "is a folder"),
        ([question(ANN, "Quorn")], ["--out", "/proc/new/answers.jsonl"], "/proc is not a writable folder"),
        ([question(ANN, "Quorn")], ["--out", "{root}/questions.jsonl"], "is also the file of questions"),
        ([question(ANN, "Quorn")], ["--skip-bad", "{root}/bad.jsonl", "--out", "{root}/bad.jsonl"], "or bad rows"),
        ([question(ANN, "Quorn")], ["--label-bias", "{root}/h", "--write"], "Leave out  --write"),
        ([question(ANN, "Quorn")], ["--skip-bad", "{root}/h", "--history", "{root}/h"], "the file of earlier items"),
    ],
)
def test_a_mistake_is_reported_before_a_model_is_loaded(world, tmp_path, monkeypatch, rows, words, message):
    monkeypatch.setattr("mta.cli.options.open_bank", pytest.fail)
    path = written(tmp_path / "questions.jsonl", rows)
    said = run("predict", path, *world.at, *(word.format(root=tmp_path) for word in words))
    assert (said.code, message in said.err) == (1, True), said.err


def test_a_label_bias_is_fitted_to_a_file_of_items_as_in_a_comparison(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # there is no store
    more = written(tmp_path / "more.jsonl", [question(ANN, "Quorn"), question("eve", "Quorn")])
    own, pooled = lines((said := mta("predict", more, "--bank", world.bank, "--label-bias", world.new)).out)
    assert (own["model"], pooled["model"]) == ("label bias", "task")
    assert "1 of 2 people have no items for a label bias: the pooled model answers" in said.err
    base, bank, settings = open_bank(world.bank)
    personal, labels = Personalizer(base, bank, run=settings), bank.task.labels
    (items,) = (person.items for person in read_people(world.new, bank.task) if person.id == ANN)
    gold = torch.tensor([labels.index(bank.task.target(item)) for item in items])
    bias = fitted_bias(personal.label_scores([(TASK, items)])[0], gold, features_of(labels), STD)
    shares = personal.shares([(TASK, one["question"]) for one in (own, pooled)])
    odds = [shares[0][label] * math.exp(bias[k]) for k, label in enumerate(labels)]
    assert own["shares"] == pytest.approx({label: odd / sum(odds) for label, odd in zip(labels, odds)}, abs=1e-5)
    assert own["shares"] != pytest.approx(shares[0], abs=1e-3)
    assert pooled["shares"] == pytest.approx(shares[1], abs=1e-5)
    assert tool.biases_of(personal, [Person(ANN, items), Person("eve", ())]).keys() == {ANN}


def test_a_bank_whose_prompts_show_earlier_items_needs_no_store(world, asked, tmp_path, monkeypatch):
    """The pooled model answers from the file of earlier items; a bank of other prompts refuses it."""
    bank = tmp_path / "bank"
    mta(*world.build[:-1], bank, "task_lora.history=2", "calibration.enabled=false")
    monkeypatch.chdir(tmp_path)
    at = ["--bank", bank, "--fallback", "task"]
    found = lines(mta("predict", asked, *at, "--history", world.new).out)
    base, opened, settings = open_bank(bank)
    personal = Personalizer(base, opened, run=settings)
    items = {person.id: person.items for person in read_people(world.new, opened.task)}
    for one in found:
        shown = one["question"] | {PROFILE: in_words(opened.task, items[one["person"]][-2:])}
        assert one["shares"] == pytest.approx(personal.shares([(TASK, shown)])[0], abs=1e-5)
    said = run("predict", asked, *world.at, "--history", world.new)
    assert (said.code, "task_lora.history=8" in said.err) == (1, True)
    said = run("predict", asked, *at, "--history", world.new, "--out", world.new)
    assert (said.code, "is also the file of questions" in said.err) == (1, True)
    said = run("predict", asked, "--bank", bank, "--store", "poeple", "--fallback", "task", "--history", world.new)
    assert (said.code, "there is no store at" in said.err) == (1, True)
