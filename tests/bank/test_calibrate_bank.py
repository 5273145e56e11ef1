"""Calibrating a bank that an older version built: what changes, what does not, and what an interruption costs."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import people_of

import mta
from mta.bank.calibrate import Measure
from mta.bank.format import mark_stale, read_info, verify
from mta.config import CalibrationSettings, Run, override
from mta.errors import ConfigError, InputError, OtherBank

WRITTEN = Path(__file__).parents[1] / "fixtures" / "release_0_1"
RUN = Run(calibration=CalibrationSettings(people=8, shots=3, queries=2, steps=1))
OTHERS = people_of(9, prefix="other-")


@pytest.fixture
def folder(tmp_path, cache):
    return Path(shutil.copytree(WRITTEN, tmp_path / "written"))


@pytest.fixture
def base(folder):
    return mta.BaseModel.load(str(folder / "model"), dtype="float64", max_tokens=400)


def calibrated(folder, base, people=OTHERS, **how) -> mta.Bank:
    return mta.Bank.open(folder / "bank", base).calibrate(base, people, run=RUN, **how)


def test_an_older_bank_is_calibrated_in_place(folder, base):
    before = mta.Bank.open(folder / "bank", base)
    assert before.calibration is None
    after = calibrated(folder, base)
    verify(folder / "bank", after.info, full=True)
    assert after.hash != before.hash
    assert after.calibration.info == after.info.calibration
    assert after.calibration.info.people == 8
    assert {name: after.info.files[name] for name in before.info.files} == before.info.files
    assert not (folder / "bank" / "work").exists()
    assert "What to expect" in (folder / "bank" / "README.md").read_text()


def test_people_are_personalized_by_one_gradient_after_a_calibration(folder, base):
    run = override(Run(), ["merge.policy=laplace"])
    with pytest.raises(ConfigError, match="policy 'laplace' needs a calibrated bank"):
        mta.Personalizer(base, mta.Bank.open(folder / "bank", base), run=run).personalize(OTHERS[:2])
    personal = mta.Personalizer(base, calibrated(folder, base), folder / "people", run=run)
    known = json.loads((WRITTEN / "expected.json").read_text())["people"]
    with pytest.raises(OtherBank):
        personal.state(min(known))
    personal.personalize(OTHERS[:2])
    state = personal.state(OTHERS[0].id)
    assert state.shots == len(OTHERS[0].items)
    assert len(state.gradient) == len(state.w) == len(personal.bank)


def test_an_interrupted_calibration_resumes_and_gives_the_same(folder, base, tmp_path, monkeypatch):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    whole = calibrated(other, base)
    done, scores = [], Measure.scores

    def stops(measure, piece):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(piece.name)
        return scores(measure, piece)

    with monkeypatch.context() as patched:
        patched.setattr(Measure, "scores", stops)
        with pytest.raises(KeyboardInterrupt):
            calibrated(folder, base)
    assert read_info(folder / "bank").calibration is None
    again = []
    monkeypatch.setattr(Measure, "scores", lambda measure, piece: (again.append(piece.name), scores(measure, piece))[1])
    assert calibrated(folder, base).hash == whole.hash
    assert done
    assert not set(done) & set(again)


def test_people_behind_a_calibration_are_remembered(folder, base):
    bank = calibrated(folder, base)
    parts = [bank.info.members.artefacts_of(person.id) for person in OTHERS]
    assert parts.count(["calibration"]) == 8
    used = OTHERS[parts.index(["calibration"])].id
    assert mark_stale(folder / "bank", used) == ["calibration"]


def test_nobody_in_the_bank_is_calibrated_on(folder, base):
    members = read_info(folder / "bank").members
    people = mta.read_people(folder / "new.jsonl", task="movielens-rating")
    assert not any({"anchor", "task LoRA"} & set(members.artefacts_of(person.id)) for person in people)
    with pytest.raises(InputError, match="0 people are given"):
        calibrated(folder, base, [])


def test_calibrating_twice_replaces_the_first(folder, base):
    first = calibrated(folder, base)
    second = calibrated(folder, base, people_of(10, prefix="more-"))
    assert second.hash != first.hash
    assert [part for person in OTHERS for part in second.info.members.artefacts_of(person.id)] == []
