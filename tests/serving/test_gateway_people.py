"""The gateway keeps histories, personalizes, and forgets; files, metrics, and lists contain no secret."""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx2
import openai
import pytest
from conftest import people_of
from gateway import said
from gateway import world as world  # the fixture
from served import until, waited
from traces import spellings

from mta.errors import BankCorrupt, PersonNotFound, StateCorrupt, StoreConflict, StoreError
from mta.personalize import forget_person, stages
from mta.personalize.outcomes import Updated
from mta.personalize.shots import shots_of
from mta.store.state import State


def in_memory(world):
    """The people whose models are in memory, or warm in a slot."""
    engine = world.service.engine
    return {getattr(who, "person", "") for who in (*engine.activated, *engine.scheduler.known())}


def test_append_history_personalize_ask_and_forget(world):
    fields = [dict(item.fields) for item in people_of(1, items=6, seed=9)[0].items]
    items = [{"fields": one, "time": n} for n, one in enumerate(fields)]
    with world.http("team") as http:
        where = "/v1/people/team/dee"
        assert http.get(where).status_code == 404
        assert http.post(f"{where}/personalize").status_code == 400
        assert http.post(f"{where}/history", json={"items": items[:4]}).json() == {"items": 4, "kept": False}
        assert http.post(f"{where}/history", json={"items": items[4:], "keep": True}).json() == {
            "items": 2,
            "kept": True,
        }
        assert http.post(f"{where}/history", json={"items": [{"fields": {"title": "x"}}]}).status_code == 400
        wrong = http.post(f"{where}/history", json={"items": [{"fields": fields[0] | {"rating": "9"}}]})
        assert wrong.status_code == 400
        assert "unknown label '9'" in wrong.json()["error"]["message"]
        long = http.post(f"{where}/history", json={"items": [{"fields": fields[0] | {"genres": "Drama " * 900}}]})
        assert (long.status_code, long.json()["error"]["message"].partition(":")[0]) == (400, "item 1")
        assert http.post(f"{where}/personalize").status_code == 202
        done = waited(lambda: http.get(f"{where}/personalize").json())
        assert done == {"status": "done", "version": 1, "message": ""}
        kept = http.get(where).json()
        assert (kept["versions"], kept["items_kept"], kept["items_held"], len(kept["w"])) == ([1], 2, 4, 3)
        assert said(world.client("team"), "person:team/dee") is not None
        assert "team/dee" in in_memory(world)
        assert http.delete(where).json() == {
            "removed": True,
            "needs_rebuild": [],
            "exports_left": 0,
            "banks_unmarked": 0,
        }
        assert http.get(where).status_code == http.get(f"{where}/personalize").status_code == 404
        assert "team/dee" not in in_memory(world)
    with pytest.raises(openai.NotFoundError):
        said(world.client("team"), "person:team/dee")
    with pytest.raises(PersonNotFound):
        world.service.store.load("team/dee")
    assert world.service.store.history("team/dee") is None


def test_a_history_has_a_limit_and_keeps_its_queries(world):
    person = replace(people_of(1, items=603)[0], id="team/long")
    items = [{"fields": dict(item.fields), "time": item.time} for item in person.items]
    where, stored = f"/v1/people/{person.id}", replace(person.first(511), queries=person.items[602:])
    world.service.store.save_history(stored)
    with world.http("team") as http:
        for keep, before in ((True, items[511:512]), (False, items[:512])):
            assert http.post(f"{where}/history", json={"items": before, "keep": keep}).json()["items"] == 512
            refused = http.post(f"{where}/history", json={"items": items[512:513], "keep": keep})
            assert refused.status_code == 400
            assert "at most 512 items, this one would have 513" in refused.json()["error"]["message"]
        assert world.service.store.history(person.id).queries == stored.queries
        http.delete(where)


def test_a_grown_history_updates_the_state_at_the_cost_of_its_new_items(world, monkeypatch):
    person, computed = people_of(1, items=7, seed=4)[0], []
    items = [{"fields": dict(item.fields), "time": n} for n, item in enumerate(person.items)]
    measured = stages.mean_nll
    monkeypatch.setattr(
        "mta.personalize.stages.mean_nll",
        lambda base, jobs, *more, **how: (
            computed.extend(len(job.examples) for job in jobs) or measured(base, jobs, *more, **how)
        ),
    )
    where = "/v1/people/team/grown"
    with world.http("team") as http:
        for some, expected in ((items[:6], 6), (items[6:], 1)):
            computed.clear()
            http.post(f"{where}/history", json={"items": some})
            assert http.post(f"{where}/personalize").status_code == 202
            assert waited(lambda: http.get(f"{where}/personalize").json())["status"] == "done"
            assert set(computed) == {expected}
        http.delete(where)


@pytest.mark.parametrize(("policy", "gradient"), [("laplace", (0.5,)), ("posterior", ())])
def test_a_state_is_not_replaced_by_one_of_fewer_items_unless_the_request_says_so(world, policy, gradient):
    where, store = "/v1/people/team/few", world.service.store
    bank = world.service.jobs.personal.bank.hash
    state = State(bank, (0,), (1.0,), policy, "", "work", 0, gradient=gradient, shots=8)
    store.save("team/few", state)
    item = {"fields": dict(people_of(1, items=1)[0].items[0].fields)}
    with world.http("team") as http:
        http.post(f"{where}/history", json={"items": [item]})
        refused = http.post(f"{where}/personalize")
        assert refused.status_code == 400
        assert "made from 8 items, and this server knows 1" in refused.json()["error"]["message"]
        assert store.load("team/few") == state
        assert http.post(f"{where}/personalize", json={"latest": 1}).status_code == 202
        assert waited(lambda: http.get(f"{where}/personalize").json())["version"] == 2
        http.delete(where)


def test_a_state_of_as_many_other_items_is_not_replaced(world):
    where, store = "/v1/people/team/others", world.service.store
    (person,) = people_of(1, items=2, prefix="others")
    store.save(
        "team/others",
        State(world.service.jobs.personal.bank.hash, (0,), (1.0,), "posterior", person.digest(), "work", 0, shots=2),
    )
    items = [{"fields": dict(item.fields)} for item in people_of(1, items=2, seed=5)[0].items]
    with world.http("team") as http:
        http.post(f"{where}/history", json={"items": items})
        refused = http.post(f"{where}/personalize")
        assert refused.status_code == 400
        assert "made from 2 items, and this server knows 2 of the person's items, others" in refused.text
        http.delete(where)


@pytest.mark.parametrize(("key", "named"), [("admin", True), ("team", False)])
def test_a_remaining_export_is_named_to_the_operator_and_stays_recorded_for_other_keys(world, tmp_path, key, named):
    personal, store, id = world.service.jobs.personal, world.service.store, "team/exported"
    personal.personalize([replace(people_of(1, items=4, seed=3)[0], id=id)])
    personal.export(id, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"changed")
    with world.http(key) as http:
        found = http.delete("/v1/people/team/exported").json()
    assert found["exports_left"] == 1
    assert ("exports" in found) == named
    assert [export.folder for export in store.exports.of(id)] == ([] if named else [str(tmp_path / "adapter")])
    assert forget_person(id, store).exports_left == (
        [] if named else [f"{tmp_path}/adapter (its adapter was changed since)"]
    )


def test_a_person_key_lists_its_model_while_the_model_exists(world):
    def listed():
        return [model.id for model in world.client("ann").models.list()]

    state = world.service.store.load("ann")
    assert "person:ann" in listed()
    forget_person("ann", world.service.store)
    try:
        assert "person:ann" not in listed()
    finally:
        world.service.store.save("ann", state)  # other tests ask her
    assert "person:ann" in listed()


def personalized(world, person):
    """The status of a person who was personalized from all items over HTTP."""
    where, items = f"/v1/people/{person.id}", [{"fields": dict(one.fields), "time": one.time} for one in person.items]
    with world.http("admin") as http:
        http.post(f"{where}/history", json={"items": items})
        assert http.post(f"{where}/personalize").status_code == 202
        return waited(lambda: http.get(f"{where}/personalize").json())


def test_a_diverged_person_fails_and_the_others_are_done(world, monkeypatch):
    people = people_of(2, items=3, prefix="astray")
    key = shots_of(world.service.jobs.personal.base, world.service.task, people[0]).key
    measured = stages.mean_nll
    nan = float("nan")
    monkeypatch.setattr(
        "mta.personalize.stages.mean_nll",
        lambda base, jobs, *more, **how: [
            nan if job.key == key else loss for job, loss in zip(jobs, measured(base, jobs, *more, **how))
        ],
    )
    with ThreadPoolExecutor(2) as pool:
        failed, done = pool.map(lambda person: personalized(world, person), people)
    assert (failed["status"], done["status"]) == ("failed", "done")
    assert "diverged" in failed["message"]


@pytest.mark.parametrize("kind", [StateCorrupt, StoreConflict, PersonNotFound, StoreError, BankCorrupt])
@pytest.mark.parametrize("raises", [False, True])
def test_a_status_shows_no_path_and_no_other_id(world, monkeypatch, kind, raises):
    jobs, (person,) = world.service.jobs, people_of(1, items=2, prefix=f"broken-{kind.__name__}-{raises}-")
    error = kind(f"{world.service.store.files.root}/ab/1.safetensors of 'bob' is damaged", hint="Remove bob.")

    def update(people, fewer, session):
        if raises:
            raise error
        return Updated(0, 0, 0, 0, 0, failed={person.id: error})

    monkeypatch.setattr(jobs.personal, "update", update)
    status = personalized(world, person)
    assert status["status"] == "failed"
    assert len(status["message"].split()) > 3
    assert "bob" not in status["message"]
    assert "safetensors" not in status["message"]


def test_only_the_last_finished_statuses_are_kept(world, monkeypatch):
    monkeypatch.setattr("mta.serving.api.jobs.REMEMBERED", 1)
    people = people_of(3, items=2, prefix="many")
    assert [personalized(world, person)["status"] for person in people] == ["done"] * 3
    left = [world.service.jobs.status(person.id) for person in people]
    assert [status and status.state for status in left] == [None, None, "done"]


def test_forgetting_during_other_requests_leaves_nothing(world):
    item = {"fields": dict(people_of(1, items=1)[0].items[0].fields)}
    where, store = "/v1/people/team/eve", world.service.store

    statuses = {way: list[int]() for way in ("keep", "hold", "personalize", "ask", "forget")}

    def busy(seed):
        draw = random.Random(seed)
        with world.http("team") as http:
            for _ in range(12):
                way = draw.choice(list(statuses))
                if way in ("keep", "hold"):
                    found = http.post(f"{where}/history", json={"items": [item], "keep": way == "keep"})
                elif way == "ask":
                    asked = {"model": "person:team/eve", "prompt": "x", "max_tokens": 2}
                    found = http.post("/v1/completions", json=asked)
                elif way == "personalize":
                    found = http.post(f"{where}/personalize")
                else:
                    found = http.delete(where, timeout=60)
                statuses[way].append(found.status_code)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(busy, range(6)))
    assert set(statuses["forget"]) == {200}
    assert set(statuses["keep"] + statuses["hold"]) == {200}
    assert 202 in statuses["personalize"]
    assert set(statuses["personalize"]) <= {202, 400, 404, 409, 429}
    assert set(statuses["ask"]) <= {200, 404, 409, 503}  # 409, 503: forgotten while the answer was written
    with world.http("team") as http:
        assert http.delete(where, timeout=60).status_code == 200
        jobs = world.service.jobs
        until(lambda: not (jobs._running or jobs._waiting()))
        assert http.get(where).status_code == http.get(f"{where}/personalize").status_code == 404
    assert (store.latest("team/eve"), store.history("team/eve")) == (None, None)
    assert "team/eve" not in in_memory(world)


def test_metrics_count_and_contain_no_ids(world):
    said(world.client("serve"), "person:ann")
    said(world.client("serve"), "person:team/cy")
    with pytest.raises(openai.NotFoundError):
        said(world.client("team"), "person:team/dee")
    text = httpx2.get(f"{world.url}/metrics", timeout=60).text
    for name in (
        "mta_requests_total",
        "mta_first_token_seconds_count",
        "mta_engine_activated",
        "mta_answer_tokens_total",
    ):
        assert name in text
    assert {name for line in text.splitlines() for name in re.findall(r'(\w+)="', line)} <= {"kind", "status", "le"}
    for secret in ("person:ann", "team/cy", "team/dee", "Film"):
        assert not any(word in text.encode() for word in spellings(secret)), secret


def test_files_contain_no_secret(world):
    files = [path for path in Path(world.service.store.files.root).parent.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert not any(secret.encode() in path.read_bytes() for secret in world.secrets.values()), path


def test_a_person_forgotten_elsewhere_is_not_served_from_the_cache(world):
    store, client = world.service.store, world.client("serve")
    kept = [store.load("bob"), store.load("team/cy")]
    store.save("dan", kept[0])
    before = said(client, "person:dan@v1")
    forget_person("dan", store)
    with pytest.raises(openai.NotFoundError):
        said(client, "person:dan@v1")
    store.save("dan", kept[1])
    assert said(client, "person:dan@v1") != before
    assert said(client, "person:dan@v1") == said(client, "person:team/cy")
