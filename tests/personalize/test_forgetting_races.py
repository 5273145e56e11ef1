"""Forgetting against readers and writers that are at work in the same moment."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from at_once import at_once
from conftest import people_of
from files import path_of
from stores import ANN, export_from, exported, state

from mta.errors import PersonForgotten, StoreError
from mta.lora.peft import WEIGHTS
from mta.personalize.forgetting import forget_person
from mta.serving.api.histories import Histories
from mta.store import Session, Store
from mta.store.maintenance import check
from mta.store.tombstones import Tombstones
from mta.system.storage import Storage


def test_a_state_read_between_tombstone_and_removal_is_not_saved(tmp_path, monkeypatch):
    store, remove, seen = Store(tmp_path), Store.remove, []
    store.save(ANN, state())

    def read_first(self, id):
        if not seen:
            seen.append((store.tombstones.of(id), store.load(id)))
        return remove(self, id)

    monkeypatch.setattr(Store, "remove", read_first)
    forget_person(ANN, Store(tmp_path))
    known, old = seen[0]
    with pytest.raises(PersonForgotten):
        Session(store, known).save(ANN, old)
    assert ANN not in store


def exporting(url, process, barrier):
    store = Store(url)
    barrier.wait(60)
    for n in range(8):
        export_from(store, Path(f"{url}-exports", f"{process}-{n}"))


def appending(url, process, barrier):
    histories = Histories(Store(url), 1000)
    barrier.wait(60)
    for item in people_of(1, items=8, seed=process)[0].items:
        histories.append(ANN, [item], keep=True)


def test_exports_of_several_processes_at_once_are_all_recorded(tmp_path):
    at_once(exporting, *((tmp_path / "people", n) for n in range(3)))
    assert len(Store(tmp_path / "people").exports.of(ANN)) == 24


def test_items_appended_by_two_gateways_at_once_are_all_kept(tmp_path):
    at_once(appending, *((tmp_path, n) for n in range(3)))
    store = Store(tmp_path)
    assert len(store.history(ANN).items) == 24
    assert (check(store).strangers, check(store).leftovers, check(store).exposed) == ([], [], "")
    forget_person(ANN, store)
    assert not any(tmp_path.glob("??/*"))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes()] == ["store.json"]


def test_an_export_that_fails_does_not_bring_the_list_of_a_forgotten_person_back(tmp_path):
    store = Store(tmp_path / "people")
    export_from(store, tmp_path / "a")
    known = store.tombstones.of(ANN)

    def fail():
        with Session(store, known).exporting(ANN, tmp_path / "b"):
            forget_person(ANN, Store(tmp_path / "people"))
            raise OSError("the disk is full")

    with pytest.raises(PersonForgotten):
        fail()
    assert store.exports.of(ANN) == []
    assert not any((tmp_path / "people").glob("??/*"))


def test_weights_are_removed_although_a_temporary_file_vanishes(tmp_path, monkeypatch):
    export, remove, calls = exported(tmp_path / "out"), shutil.rmtree, []
    (tmp_path / f".out.{'0' * 32}").mkdir()

    def vanished(folder):
        calls.append(folder)
        if len(calls) == 1:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        remove(folder)

    monkeypatch.setattr("mta.lora.peft.shutil.rmtree", vanished)
    assert export.remove() is None
    assert (list(tmp_path.iterdir()), len(calls)) == ([], 2)


def test_remaining_copies_are_reported_after_a_failed_attempt(tmp_path, monkeypatch):
    store = Store(tmp_path / "people")
    store.save(ANN, state())
    export_from(store, tmp_path / "changed")
    (tmp_path / "changed" / WEIGHTS).write_bytes(b"changed")

    def refuse(self, id):
        raise StoreError("the states cannot be removed", hint="-")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "remove", refuse)
        with pytest.raises(StoreError, match="states cannot be removed"):
            forget_person(ANN, store)
    assert len(forget_person(ANN, store).exports_left) == 1
    assert forget_person(ANN, store).exports_left == []


def test_a_damaged_list_of_exports_is_named_once(tmp_path):
    store = Store(tmp_path)
    store.save(ANN, state())
    (path_of(store, ANN) / "exports.json").write_bytes(b"{")
    assert forget_person(ANN, store).exports_left[0].startswith("all exports, if there are any")
    assert forget_person(ANN, store).exports_left == []


def test_a_state_whose_saving_fails_after_its_person_was_forgotten_does_not_stay(tmp_path, monkeypatch):
    store, write, names = Store(tmp_path), Storage.write, Tombstones.names
    store.save("bob", state())
    known = store.tombstones.of(ANN)

    def fail(*_):
        raise StoreError("an I/O error", hint="-")

    def written(storage, name, data, *, new):
        monkeypatch.undo()
        forget_person(ANN, Store(tmp_path))
        write(storage, name, data, new=new)
        monkeypatch.setattr(Tombstones, "names", fail)

    monkeypatch.setattr(Storage, "write", written)
    with pytest.raises(StoreError, match="an I/O error"):
        Session(store, known).save(ANN, state())
    monkeypatch.undo()
    assert (ANN in store, names(store.tombstones) != known) == (False, True)
