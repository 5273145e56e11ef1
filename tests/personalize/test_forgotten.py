"""Who is forgotten is in no file any more: every file that was written while they were here is searched."""

import base64
import dataclasses
import json
from pathlib import Path

import pytest
from conftest import TINY_RUN, HashEncoder, people_of, personalizer, stopped_when
from files import folder_of, path_of
from tiny import base_of
from traces import traces

from mta import TASK
from mta.bank.build import build_bank
from mta.bank.context import Build
from mta.bank.notes import parts_to_rebuild
from mta.config import CompareSettings
from mta.data.history import Item, Person
from mta.errors import PersonNotFound
from mta.evaluation.compare import compare
from mta.personalize import Personalizer, forget_person
from mta.store import Store
from mta.store.maintenance import check
from mta.training.checkpoint import Checkpoint


def somebody(items: int = 6) -> Person:
    """A person whose id and texts are like nothing else, with everything in them that is escaped somewhere."""
    rows = [
        Item({"title": f'Xylogräd "{n}" <&> \\Æther\\ %41', "genres": "Drama", "rating": str(1 + n % 5)}, time=float(n))
        for n in range(items)
    ]
    return Person.of('Quispe-Hoxha "zq" <ann+7@exämple.org> %2F\\', rows)


EVE = somebody()
OTHERS = people_of(3, items=6, prefix="x", seed=5)


def stopped(personal: Personalizer, people: list[Person], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run over these people that was stopped amid stage 3, and left its plan and checkpoint."""
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "due", lambda _: True)
        with stopped_when(lambda stage, step: (stage, step.step) == ("stack", 2)) as stop:
            personal.personalize(people, on_step=stop)
    assert {path.suffix for path in Path(personal.store.files.at("work")).glob("*/*")} == {".json", ".checkpoint"}


def leftovers(store: Store, id: str) -> None:
    """What writers that were killed leave beside a person's files."""
    folder = path_of(store, id)
    for name in ("history.json", "exports.json", "9.safetensors"):
        (folder / f".{name}.{'0' * 32}").write_bytes((folder / "history.json").read_bytes())


def test_a_person_who_is_forgotten_is_in_no_file(own_bank, tmp_path, cache, monkeypatch):
    base, bank = own_bank
    places = [tmp_path / name for name in ("people", "cache", "bank", "exports", "results")]
    personal = personalizer(base, bank, store=tmp_path / "people")
    everybody = [EVE, *OTHERS]
    personal.personalize(everybody, histories=everybody)
    personal.personalize([EVE.first(4)], histories=[EVE.first(4)])
    personal.store.rollback(EVE.id, 1)
    for name in ("plain", EVE.id):
        personal.export(EVE.id, tmp_path / "exports" / name, rank=3)
    personal.generate(
        [(EVE.id, {"title": "Film 7", "genres": "Drama"}), (TASK, {"title": "Film 7", "genres": "Drama"})]
    )
    evaluation = CompareSettings(shots=2, queries=2, policies=("posterior",))
    found = compare(base, bank, everybody, evaluation, run=TINY_RUN, encoder=HashEncoder())
    found.write(tmp_path / "results", "mta compare people.jsonl")
    stopped(personalizer(base, bank, store=tmp_path / "people", seed=1), everybody, monkeypatch)
    leftovers(personal.store, EVE.id)
    before = {what for _, what in traces(places, EVE, personal.store)}
    assert before >= {"id", "texts", "keyed hash", "hash of the texts"}  # the search finds what is there

    assert personal.forget(EVE.id).exports_left == []
    assert traces(places, EVE, personal.store) == []
    assert traces([tmp_path], EVE, personal.store) == []
    assert not Path(
        personal.store.files.at("work")
    ).exists()  # weights trained on their texts: no search would know them
    assert not any((tmp_path / "exports").iterdir())
    with pytest.raises(PersonNotFound):
        personal.state(EVE.id)
    whole = check(personal.store)
    assert (whole.people, whole.histories, whole.damaged, whole.strangers) == (3, 3, {}, [])


def test_only_a_kept_history_holds_texts_and_only_the_list_of_exports_may_name_a_person(own_bank, tmp_path):
    personal = personalizer(*own_bank, store=tmp_path / "people")
    personal.personalize([EVE, *OTHERS])
    hashes, places = {"keyed hash", "hash of the texts"}, [tmp_path / "people", tmp_path / "bank"]
    assert {what for _, what in traces(places, EVE, personal.store)} == hashes
    personal.export(EVE.id, tmp_path / "exports" / EVE.id)
    named = [Path(path) for path, what in traces(places, EVE, personal.store) if what == "id"]
    assert [(path.name, path.stat().st_mode & 0o077) for path in named] == [("exports.json", 0)]
    personal.personalize([EVE], histories=[EVE])
    found = traces(places, EVE, personal.store)
    assert {what for _, what in found} == {*hashes, "id", "texts"}
    assert {Path(path).name for path, what in found if what == "texts"} == {"history.json"}


# -- somebody the bank learnt from -------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_task", [True, False], ids=["task LoRA", "anchor"])
@pytest.mark.parametrize("killed", [False, True])
def test_a_bank_holds_no_id_and_no_text_of_its_members(task, tmp_path, cache, monkeypatch, as_task, killed):
    """Not even one whose building was killed. Their keyed membership stays: how else would it be known?"""
    monkeypatch.setattr(Checkpoint, "due", lambda _: True)
    person, store = (EVE if as_task else somebody(40)), Store(tmp_path / "people")
    people, candidates, bank = people_of(4, prefix="t"), people_of(12, prefix="c"), tmp_path / "bank"
    (people if as_task else candidates).append(person)  # the most active candidate
    how = (base_of(), task, HashEncoder(), people, candidates, TINY_RUN, bank)
    if killed:
        with stopped_when(lambda stage, step: (stage, step.step) == ("anchors", 3)) as stop:
            build_bank(Build(*how, on_step=stop))
        assert (bank / "work" / "anchors-000.checkpoint").is_file()
    else:
        build_bank(Build(*how))
        learnt = ["task LoRA"] if as_task else ["task LoRA", "clusters", "anchor"]
        assert forget_person(person.id, store, bank).needs_rebuild == learnt
        assert parts_to_rebuild(bank) == sorted(learnt)
        assert json.loads((bank / "needs-rebuild.json").read_text())["needs_rebuild"] == sorted(learnt)
    assert traces([bank, cache], person, store) == []


def test_the_search_finds_every_encoding_of_a_text(tmp_path):
    store, text = Store(tmp_path / "people"), EVE.items[0].fields["title"]
    header = json.dumps({"state": json.dumps({"title": text})})
    written = [text.encode(), json.dumps(text).encode(), header.encode(), text.encode("utf-16")]
    written += [
        json.dumps(text).encode().hex().encode(),
        *(base64.b64encode(b"?" * n + text.encode()) for n in range(3)),
    ]
    for n, content in enumerate(written):
        (tmp_path / f"{n}.bin").write_bytes(b"\0" * n + content)
    (tmp_path / folder_of(store, EVE.id)).mkdir()
    found = traces([tmp_path], EVE, store)
    assert sorted(what for _, what in found) == ["keyed hash"] + ["texts"] * len(written)
    assert traces([tmp_path], dataclasses.replace(EVE, id="somebody else", items=()), store) == []


def test_forgetting_removes_no_folder_that_is_not_a_runs(tiny, tmp_path):
    mine = [tmp_path / "work" / name / "mine.txt" for name in ("0" * 24, "of-mine")]
    for path in mine:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    forget_person(EVE.id, Store(tmp_path))  # there is no store
    assert all(path.exists() for path in mine)
    personal = personalizer(*tiny, store=tmp_path)
    personal.personalize([EVE])
    personal.forget(EVE.id)
    assert [path.exists() for path in mine] == [False, True]
