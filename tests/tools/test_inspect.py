"""The summary of a person: every number is the state's own, and no text of theirs is among it."""

import json
from dataclasses import asdict

import pytest
from conftest import people_of
from crowd import knowing

from mta.data.history import Person
from mta.errors import BankNotFound, PersonNotFound
from mta.tools.inspect import summarize

PEOPLE = people_of(3, items=4, prefix="x", seed=5)


@pytest.fixture
def known(tiny, tmp_path):
    personal = knowing(*tiny, tmp_path / "people", PEOPLE)
    for person in PEOPLE:
        personal.store.save_history(person)
    return personal


def test_an_account_says_what_the_state_says(known, tmp_path):
    store, bank, state = known.store, known.bank, known.state("x0")
    known.export("x0", tmp_path / "out")
    found = summarize("x0", store, bank.folder)
    assert (found.version, found.versions, found.time) == (1, [1], store.time_of("x0", 1))
    assert (found.bank, found.bank_here, found.policy) == (bank.hash, bank.hash, "posterior")
    assert found.weights == dict(zip(state.anchors, state.w))
    assert list(found.weights.values()) == sorted(state.w, reverse=True)
    numbers = sum(tensor.numel() for tensor in state.stack.tensors().values())
    assert found.stack == {"rank": 1, "bytes": 8 * numbers}  # the tiny base computes in float64
    assert (found.losses, found.history, found.trained) == (state.losses, 4, [])
    assert [one.folder for one in found.exports] == [str(tmp_path / "out")]
    assert found.bytes == store.nbytes("x0")


def test_no_text_is_shown_and_no_model_is_loaded(known, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("mta.model.base.BaseModel.__init__", refuse)
    monkeypatch.setattr("mta.bank.format.read_adapters", refuse)
    text = json.dumps([asdict(summarize("x0", known.store, known.bank.folder))])
    for item in PEOPLE[0].items:
        assert item.fields["title"] not in text
    assert "Film" not in text


def test_the_parts_of_a_bank_trained_on_a_person_are_named(known):
    known.personalize(people_of(1, prefix="t"))
    assert summarize("t0", known.store, known.bank.folder).trained == ["task LoRA"]


def test_who_is_not_there(known, tmp_path):
    with pytest.raises(PersonNotFound, match="no state of 'eve'"):
        summarize("eve", known.store, known.bank.folder)
    known.store.save_history(Person("eve", PEOPLE[0].items))
    with pytest.raises(PersonNotFound, match=f"no state of 'eve' yet, but {len(PEOPLE[0].items)} stored items"):
        summarize("eve", known.store, known.bank.folder)
    with pytest.raises(BankNotFound, match="no bank at"):
        summarize("x0", known.store, tmp_path / "nowhere")
