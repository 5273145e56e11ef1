"""Shares of memory and queue per key: the largest share gives way, and the operator's quarter stays."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mta.data.history import Item, Person
from mta.serving.api.auth import LOCAL, Key
from mta.serving.api.histories import Histories, size_of
from mta.serving.api.jobs import Jobs
from mta.serving.engine import QueueFull, Refused
from mta.store import Store

ROOM = 160_000


def team(n):
    return Key(name=f"team{n}", sha256="0" * 64, rights="prefix", scope=f"team{n}/")


def item(characters=100):
    return Item({"text": "x" * characters})


def size(characters=100, items=1):
    return size_of(Person("", (item(characters),) * items))


def taken(histories, people):
    return sum(size(items=held) for id in people if (held := histories.held(id)))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 30)), max_size=400))
def test_no_key_exceeds_its_share_and_new_items_are_always_held(tmp_path, appended):
    histories, people = Histories(Store(tmp_path), 50, ROOM), {n: set() for n in range(7)}
    for owner, n in appended:
        id = f"team{owner}/{n}" if owner else f"{n}"
        if histories.held(id) == 50:
            continue
        people[owner].add(id)
        before = histories.held(id)
        histories.append(id, [item()], False, team(owner) if owner else LOCAL)
        assert histories.held(id) == before + 1
        each = {n: taken(histories, ids) for n, ids in people.items()}
        assert sum(each.values()) <= ROOM
        assert all(each[n] <= ROOM // 4 for n in range(1, 7))
        assert sum(each[n] for n in range(1, 7)) <= ROOM * 3 // 4


def test_keys_of_one_person_fill_three_quarters_together_and_leave_the_operators_quarter(tmp_path):
    histories = Histories(Store(tmp_path), 50, ROOM)
    mine = [f"{n}" for n in range(ROOM // 4 // size())]
    for id in mine:
        histories.append(id, [item()], False)
    people = [Key(name=f"p{n}", sha256="0" * 64, rights="person", scope=f"p{n}") for n in range(30)]
    for key in people:
        for _ in range(20):
            histories.append(key.scope, [item()], False, key)
        assert histories.held(key.scope) == 20
    assert taken(histories, [key.scope for key in people]) <= ROOM * 3 // 4
    assert all(histories.held(id) for id in mine)


def test_a_person_larger_than_the_keys_share_is_refused_and_displaces_nobody(tmp_path):
    histories, small = Histories(Store(tmp_path), 500, ROOM), [team(n) for n in range(1, 4)]
    for key in small:
        histories.append(key.scope, [item()], False, key)
    histories.append("mine", [item()], False)
    greedy = Key(name="greedy", sha256="0" * 64, rights="person", scope="greedy")
    for _ in range(9):
        histories.append("greedy", [item(3900)], False, greedy)
    with pytest.raises(Refused, match="bytes in memory"):
        histories.append("greedy", [item(3900)], False, greedy)
    assert all(histories.held(id) == 1 for id in ["mine", *(key.scope for key in small)])


def test_the_oldest_people_are_dropped_and_forgetting_frees_room(tmp_path):
    histories = Histories(Store(tmp_path), 50, room=2 * size(200, 2) + 1)
    for id in "abac":  # a is not the oldest any more
        histories.append(id, [item(200)], False)
    assert [histories.held(id) for id in "abc"] == [2, 0, 1]
    assert histories.forget("a")
    assert not histories.forget("b")
    histories.append("d", [item(1000)], False)
    assert [histories.held(id) for id in "acd"] == [0, 1, 1]


def test_appending_from_many_threads_loses_nothing(tmp_path):
    histories = Histories(Store(tmp_path), 500)

    def append(n):
        for turn in range(200):
            histories.append(f"team{n % 3}/{n}-{turn % 20}", [item(9)], False, team(n % 3))
            if turn % 50 == 49:
                histories.append(f"gone/{n}", [item(9)], False)
                assert histories.forget(f"gone/{n}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(append, range(8)))
    assert all(histories.held(f"team{n % 3}/{n}-{turn}") == 10 for n in range(8) for turn in range(20))
    assert histories._shares.used.total() == 8 * 20 * size(9, 10)


@asynccontextmanager
async def busy(folder, most=256):
    """Jobs whose running one, of the person "first", goes on until the block ends or ``going_on`` is set."""
    going_on, forgotten, store = threading.Event(), [], Store(folder)
    personal = SimpleNamespace(
        update=lambda people, **how: going_on.wait(30) and SimpleNamespace(failed={}, forgotten=()),
        forget=lambda person, **how: forgotten.append(person) or person,
    )
    jobs = Jobs(personal, most)

    def put(id, key=LOCAL, count=1):
        jobs.put(Person.of(id, [item()] * count), store.session(id), key)

    put("first")
    while jobs._waiting():
        await asyncio.sleep(0.01)
    try:
        yield jobs, put, forgotten, going_on
    finally:
        going_on.set()
        await jobs.close()


@pytest.mark.anyio
async def test_each_prefix_fills_a_quarter_of_the_queue_and_all_prefixes_three_quarters(tmp_path):
    async with busy(tmp_path, most=8) as (_, put, *_):
        for owner in range(1, 4):
            for n in range(2):
                put(f"team{owner}/{n}", team(owner))
            with pytest.raises(QueueFull):
                put(f"team{owner}/2", team(owner))
        with pytest.raises(QueueFull):
            put("team4/0", team(4))
        put("team1/1", team(1))  # who waits already is only given newer items
        for n in range(2):
            put(f"other/{n}")
        with pytest.raises(QueueFull):
            put("other/2")


@pytest.mark.anyio
async def test_a_job_has_few_items(tmp_path):
    async with busy(tmp_path) as (jobs, put, *_):
        for n in range(3):
            put(f"{n}", count=100)
        assert list(jobs._next()) == ["0", "1"]  # more than 256 items with the next
        for n in range(2):
            await jobs.forget(f"{n}")
        put("2", count=400)
        assert list(jobs._next()) == ["2"]  # one person at least


@pytest.mark.anyio
async def test_forgetting_waits_only_for_the_job_that_the_person_is_in(tmp_path):
    async with busy(tmp_path) as (jobs, put, forgotten, going_on):
        put("other")
        assert await jobs.forget("other") == "other"
        assert forgotten == ["other"]
        waiting = asyncio.create_task(jobs.forget("first"))
        while forgotten != ["other", "first"]:  # at once; and again when the job has ended
            await asyncio.sleep(0.01)
        assert not waiting.done()
        assert jobs.status("first") is None
        going_on.set()
        await waiting
        assert forgotten == ["other", "first", "first"]
        assert jobs.status("first") is None


@pytest.mark.anyio
async def test_a_stop_waits_only_so_long_for_a_job_and_for_those_who_wait_for_it(tmp_path):
    async with busy(tmp_path) as (jobs, _, forgotten, going_on):
        forgetting = asyncio.create_task(jobs.forget("first"))
        await asyncio.sleep(0.05)
        await jobs.close(patience=0.2)
        await forgetting
        assert forgotten == ["first", "first"]
        assert not going_on.is_set()  # the job was still running


def test_items_that_came_by_a_file_too_count_once(tmp_path):
    store = Store(tmp_path)
    histories = Histories(store, 50)
    one, two, three = (Item({"text": text}, time=n) for n, text in enumerate("abc"))
    store.save_history(Person.of("ann", [one]))
    histories.append("ann", [two, two], False)
    store.save_history(Person.of("ann", [one, two]))  # as the nightly update of a file keeps it
    histories.append("ann", [three], False)
    assert histories.of("ann").items == (one, two, two, three)  # sent twice, kept once
    store.save_history(Person.of("ann", [one, two, two, three]))
    assert histories.of("ann").items == (one, two, two, three)
