"""Files written by release 0.1.0 open with this version, and give the answers they gave then."""

import json
import shutil
from pathlib import Path

import pytest

import mta
from mta.store import Store

WRITTEN = Path(__file__).parents[1] / "fixtures" / "release_0_1"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text(encoding="utf-8"))
PEOPLE = sorted(EXPECTED["people"])


@pytest.fixture
def folder(tmp_path, cache):
    """A copy that a test may change."""
    return Path(shutil.copytree(WRITTEN, tmp_path / "written"))


@pytest.fixture
def personal(folder):
    base = mta.BaseModel.load(str(folder / "model"), dtype="float64", max_tokens=400)
    return mta.Personalizer(base, mta.Bank.open(folder / "bank", base), store=folder / "people")


def test_the_base_and_the_bank_keep_their_fingerprints(personal):
    assert personal.base.fingerprint == EXPECTED["base"]
    assert personal.bank.hash == EXPECTED["bank"]


@pytest.mark.parametrize("person", PEOPLE)
def test_a_stored_state_gives_the_answers_it_gave_then(personal, person):
    expected, question = EXPECTED["people"][person], EXPECTED["question"]
    assert list(personal.state(person).w) == expected["w"]
    scores = personal.label_scores([(person, [personal.bank.task.asked(question)])])[0][0]
    assert scores.tolist() == pytest.approx(
        expected["labels"], abs=1e-5
    )  # norms go through float32, with kernels in another order
    assert personal.generate([(person, question)], max_new_tokens=8) == [expected["text"]]


def test_the_same_history_is_recognized_as_done(personal, folder):
    people = mta.read_people(folder / "new.jsonl", task="movielens-rating")
    done = personal.personalize(people)
    assert not done.failed
    assert {person: personal.state(person).work for person in PEOPLE} == {
        person: EXPECTED["people"][person]["work"] for person in PEOPLE
    }
    assert all(personal.store.versions(person) == [1] for person in PEOPLE)


def test_a_noted_export_is_still_known(folder):
    (export,) = Store(folder / "people").exports.of(PEOPLE[2])
    assert export.folder == "/example/exports/new-02"


def test_a_person_can_be_forgotten(personal, folder):
    personal.forget(PEOPLE[0])
    assert PEOPLE[0] not in personal.store
    assert PEOPLE[1] in personal.store
