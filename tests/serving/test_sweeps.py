"""Sweeps of forgotten people: data that arrives while a sweep lists the tombstones stays."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from mta.data.history import Item, Person
from mta.serving.api.histories import Histories
from mta.serving.api.jobs import Jobs
from mta.store import Store
from mta.store.tombstones import Tombstones

ITEM = Item({"text": "x"})


@pytest.fixture
def store(tmp_path):
    """A store of a person who was forgotten once."""
    store = Store(tmp_path)
    store.identity(write=True)
    store.tombstones.add("ann")
    return store


def listing_before(monkeypatch, happens):
    """Let something happen right after the next listing, which does not know of it."""
    original = Tombstones.of_each

    def of_each(self, ids):
        found = original(self, ids)
        monkeypatch.setattr(Tombstones, "of_each", original)
        happens()
        return found

    monkeypatch.setattr(Tombstones, "of_each", of_each)


@pytest.mark.parametrize("again", [False, True])
def test_items_stay_unless_they_are_older_than_a_tombstone(store, monkeypatch, again):
    histories = Histories(store, 99)
    histories.append("ann", [ITEM], keep=False)

    def forgotten_and_back():
        store.tombstones.add("ann")
        if again:
            histories.forget("ann")
            histories.append("ann", [ITEM, ITEM], keep=False)

    listing_before(monkeypatch, forgotten_and_back)
    histories.drop_forgotten()
    assert histories.held("ann") == (2 if again else 0)  # the old items are not used, but dropped by the next sweep
    histories.drop_forgotten()
    assert ("ann" in histories._held) == again


@pytest.mark.parametrize("again", [False, True])
def test_a_waiting_person_stays_unless_forgotten_since(store, monkeypatch, again):
    going_on = threading.Event()
    done = SimpleNamespace(failed={}, forgotten=(), ahead=())
    jobs = Jobs(SimpleNamespace(update=lambda people, **how: going_on.wait(30) and done, store=store))
    try:
        jobs.put(Person.of("first", [ITEM]))
        while jobs.status("first").state == "waiting":
            threading.Event().wait(0.01)
        jobs.put(Person.of("ann", [ITEM]), since=store.tombstones.of("ann"))

        def forgotten_and_back():
            store.tombstones.add("ann")
            if again:
                jobs.put(Person.of("ann", [ITEM, ITEM]), since=store.tombstones.of("ann"))

        listing_before(monkeypatch, forgotten_and_back)
        jobs.drop_forgotten()
        jobs.drop_forgotten()
        assert (jobs.status("ann") is not None) == again
    finally:
        going_on.set()
        asyncio.run(jobs.close())
