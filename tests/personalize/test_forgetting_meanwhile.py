"""Runs, updates, and exports that are at work when a person is forgotten, and the tombstones that stop them."""

import os
import time
from pathlib import Path

import pytest
from conftest import people_of, personalizer
from crowd import knowing
from stores import state

from mta.errors import PersonForgotten
from mta.lora.peft import write_peft
from mta.personalize import forget_person
from mta.store import Session, Store, tombstones
from mta.store.maintenance import check, collect
from mta.system.storage import Storage
from mta.training.checkpoint import Checkpoint

PEOPLE = people_of(3, items=4, prefix="x", seed=5)


def nothing_of(id: str, store: Store) -> bool:
    """Whether a person has no state, no history, no exports, and not even an empty folder."""
    empty = (store.latest(id), store.history(id), store.exports.of(id)) == (None, None, [])
    return empty and not Path(store.files.at(store._path(id))).exists()


def elsewhere(store: Store, id: str) -> Store:
    """Forget a person as another process does."""
    other = Store(store.files.url)
    forget_person(id, other)
    return other


@pytest.mark.parametrize("stage", ["evidence", "stack"])
def test_a_person_who_is_forgotten_while_a_run_is_under_way_is_not_saved_by_it(tiny, tmp_path, stage):
    personal = personalizer(*tiny, store=tmp_path / "people")

    def forget(at: str, step: object) -> None:
        if at == stage and "x0" not in gone:
            gone.append("x0")
            elsewhere(personal.store, "x0")

    gone = []
    done = personal.personalize(PEOPLE, histories=PEOPLE, on_step=forget)
    assert (done.trained, done.failed, done.forgotten) == (2, {}, ("x0",))
    assert nothing_of("x0", personal.store)
    assert all(id in personal.store for id in ("x1", "x2"))
    assert not (tmp_path / "people" / "work").exists()
    assert personal.personalize(PEOPLE).trained == 1  # a call that begins later takes the items for new ones
    assert "x0" in personal.store


def test_a_person_who_is_forgotten_after_their_items_were_read_is_not_begun(tiny, tmp_path):
    personal = personalizer(*tiny, store=tmp_path / "people")
    personal.store.identity(write=True)
    session = personal.store.session()
    elsewhere(personal.store, "x0")
    for make in (personal.personalize, personal.update):
        done = make(PEOPLE, session=session, histories=PEOPLE)
        assert done.forgotten == ("x0",)
        assert nothing_of("x0", personal.store)
    assert all(id in personal.store for id in ("x1", "x2"))


def test_an_update_goes_on_for_the_others_when_a_person_is_forgotten(tiny, tmp_path):
    personal = knowing(*tiny, tmp_path / "people", [person.first(2) for person in PEOPLE])

    def forget(at: str, step: object) -> None:
        if "x0" in personal.store:
            elsewhere(personal.store, "x0")

    done = personal.update(PEOPLE, on_step=forget)
    assert (done.forgotten, done.failed, done.kept + done.retrained + done.refreshed) == (("x0",), {}, 2)
    assert nothing_of("x0", personal.store)


@pytest.mark.parametrize("when", ["before the state is created", "after"])
def test_a_state_that_is_saved_in_the_very_moment_of_forgetting_does_not_stay(url, monkeypatch, when):
    store, write = Store(url), Storage.write
    store.save("bob", state())
    known = store.tombstones.of("bob")

    def meanwhile(storage: Storage, name: str, data: bytes, *, new: bool) -> None:
        if when == "after":
            write(storage, name, data, new=new)
        monkeypatch.undo()
        forget_person("bob", Store(url))
        if when != "after":
            write(storage, name, data, new=new)

    monkeypatch.setattr(Storage, "write", meanwhile)
    with pytest.raises(PersonForgotten):
        Session(store, known).save("bob", state(1))
    assert (store.versions("bob"), check(store).people, store.files.sizes(store._path("bob"))) == ([], 0, {})
    assert store.save("bob", state(1)) == 1  # of items that came in afterwards


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_export_that_is_written_while_its_person_is_forgotten_is_removed(tiny, tmp_path, monkeypatch, when):
    personal = knowing(*tiny, tmp_path / "people", PEOPLE)

    def late(*words: object, **how: object) -> None:
        if when == "before":
            elsewhere(personal.store, "x0")
        write_peft(*words, **how)
        if when == "after":
            elsewhere(personal.store, "x0")

    monkeypatch.setattr("mta.personalize.personalizer.write_peft", late)
    with pytest.raises(PersonForgotten):
        personal.export("x0", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert nothing_of("x0", personal.store)


def test_an_export_that_is_interrupted_leaves_no_record_that_other_hosts_cannot_settle(tiny, tmp_path, monkeypatch):
    """Each container has another name."""
    personal = knowing(*tiny, tmp_path / "people", PEOPLE)

    def interrupted(*words: object, **how: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr("mta.personalize.personalizer.write_peft", interrupted)
    with pytest.raises(SystemExit):
        personal.export("x0", tmp_path / "out")
    monkeypatch.setattr("platform.node", lambda: "another")
    assert forget_person("x0", Store(tmp_path / "people")).exports_left == []


def test_a_person_is_forgotten_where_the_answer_to_a_tombstone_was_lost(tiny, tmp_path, monkeypatch):
    """Object stores repeat the request, and then find the file that they wrote."""
    personal = knowing(*tiny, tmp_path / "people", PEOPLE)
    write = Storage.write

    def written(storage: Storage, name: str, data: bytes, *, new: bool = False) -> None:
        write(storage, name, data, new=new)
        if new:
            raise FileExistsError

    monkeypatch.setattr(Storage, "write", written)
    assert forget_person("x0", personal.store).states_removed
    assert nothing_of("x0", personal.store)


def test_a_rollback_does_not_bring_back_a_person_who_is_forgotten_meanwhile(tmp_path, monkeypatch):
    store, load = Store(tmp_path), Store.load
    for seed in range(2):
        store.save("bob", state(seed))

    def slow(self: Store, id: str, version: int | None = None) -> object:
        found = load(self, id, version)
        elsewhere(store, id)
        return found

    monkeypatch.setattr(Store, "load", slow)
    with pytest.raises(PersonForgotten):
        store.rollback("bob", 1)
    assert nothing_of("bob", store)


def test_a_checkpoint_that_a_run_writes_after_one_of_its_people_was_forgotten_does_not_stay(
    tiny, tmp_path, monkeypatch
):
    personal, written = personalizer(*tiny, store=tmp_path / "people"), []
    save = Checkpoint.save

    def killed_afterwards(self: Checkpoint, *what: object) -> None:
        elsewhere(personal.store, "x0")
        save(self, *what)
        written.append(self.path)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "due", lambda _: True)
    monkeypatch.setattr(Checkpoint, "save", killed_afterwards)
    with pytest.raises(KeyboardInterrupt):
        personal.personalize(PEOPLE)
    assert written
    assert not written[0].exists()


# -- tombstones --------------------------------------------------------------------------------------------------------


def test_a_tombstone_holds_no_id_and_no_name_that_a_person_had_in_the_store(tmp_path):
    store = Store(tmp_path)
    store.save("bob", state())
    folder = store._path("bob").partition("/")[2]
    forget_person("bob", store)
    notes = list((tmp_path / "forgotten").iterdir())
    assert [note.read_bytes() for note in notes] == [b""]
    assert not [note for note in notes if "bob" in note.name or folder in note.name]
    assert store.tombstones.of("bob") == {note.name for note in notes}
    assert store.tombstones.of("ann") == frozenset()
    found = check(store)
    assert (found.people, found.strangers, found.leftovers) == (0, [], [])


def test_tombstones_go_after_a_week_with_the_next_forgetting_or_by_gc(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.save("bob", state())
    for id in ("bob", "ann"):
        forget_person(id, store)
    assert collect(store) == {}
    now, wait = time.time(), tombstones.LIFETIME + 60
    for note in (tmp_path / "forgotten").iterdir():
        os.utime(note, (now - wait, now - wait))
    monkeypatch.setattr(tombstones.time, "time", lambda: now + wait)
    assert len(collect(store, dry=True)) == 2
    forget_person("cem", store)
    assert [bool(store.tombstones.of(id)) for id in ("bob", "ann", "cem")] == [False, False, True]
    assert collect(store) == {}


def test_only_a_persons_newest_tombstone_is_kept_and_tells_everybody_who_read_items_before(tmp_path):
    store, seen = Store(tmp_path), [frozenset()]
    store.save("ann", state())
    for _ in range(9):
        forget_person("ann", store)
        seen.append(store.tombstones.names())
        assert len(seen[-1]) == 1
    assert [store.tombstones.since(["ann", "bob"], known) for known in seen] == [*[{"ann"}] * 9, set()]
