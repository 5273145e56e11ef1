"""What one key can take of what all share: a prefix's people never push others out of memory or of the queue."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mta.history import Item, Person
from mta.serving.auth import LOCAL, Key
from mta.serving.engine import QueueFull
from mta.serving.histories import Histories
from mta.serving.jobs import Jobs

TEAM = Key(name="team", sha256="0" * 64, rights="prefix", of="team/")
NOTHING_KEPT = SimpleNamespace(history=lambda id: None)


def item(characters=100):
    return Item({"text": "x" * characters})


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 900)), max_size=60))
def test_a_prefix_drops_its_own_people_and_nobody_elses(appended):
    """Everybody else as if the prefix's key had not been there, as long as they leave it a quarter."""
    shared, alone = Histories(NOTHING_KEPT, 50, room=40_000), Histories(NOTHING_KEPT, 50, room=40_000)
    others, taken = set(), 0
    for theirs, n, characters in appended:
        if theirs:
            shared.append(f"team/{n}", [item(characters)], False, TEAM)
            assert shared.of(f"team/{n}")
        elif (taken := taken + characters + 64) < 30_000:
            others.add(f"{n}")
            for histories in (shared, alone):
                histories.append(f"{n}", [item(characters)], False, LOCAL)
    for id in others:
        assert shared.of(id) == alone.of(id)
        assert shared.held(id) > 0


def test_the_oldest_people_are_dropped_and_forgetting_gives_their_room_back():
    histories = Histories(NOTHING_KEPT, 50, room=1000)
    for id in "abc":
        histories.append(id, [item(400)], False)
    assert [histories.held(id) for id in "abc"] == [0, 1, 1]
    assert histories.forget("b")
    histories.append("d", [item(400)], False)
    assert [histories.held(id) for id in "bcd"] == [0, 1, 1]


def test_a_prefix_fills_a_quarter_of_the_queue_at_most():
    going_on = threading.Event()
    personal = SimpleNamespace(personalize=lambda people: going_on.wait(30), store=None)
    jobs = Jobs(personal, most=8)
    try:
        jobs.put(Person.of("first", [item()]))
        while jobs.status("first").state != "running":
            time.sleep(0.01)
        for n in range(2):
            jobs.put(Person.of(f"team/{n}", [item()]), TEAM)
        with pytest.raises(QueueFull):
            jobs.put(Person.of("team/2", [item()]), TEAM)
        jobs.put(Person.of("team/1", [item()]), TEAM)  # who waits already is only given newer items
        for n in range(6):
            jobs.put(Person.of(f"other/{n}", [item()]))
        with pytest.raises(QueueFull):
            jobs.put(Person.of("other/6", [item()]))
    finally:
        going_on.set()
        asyncio.run(jobs.close())
