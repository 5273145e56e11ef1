"""Another process forgets a person while a gateway still holds the person's data."""

import asyncio
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import people_of
from served import served, until
from tiny import base_of, endless

from mta.bank.bank import Bank
from mta.personalize import Personalizer, forget_person
from mta.personalize.adapters import TASK
from mta.personalize.stages import Stages
from mta.serving.api.auth import Key, Keys
from mta.serving.api.histories import Histories
from mta.serving.engine import EngineRequest
from mta.store import Store
from mta.store.maintenance import collect

pytestmark = pytest.mark.integration

ITEMS = [{"fields": dict(item.fields), "time": item.time} for item in people_of(1, items=4, seed=9)[0].items]
EVE = "/v1/people/eve"


@pytest.fixture
def gateway(tiny_bank_folder, tmp_path, cache, request):
    """A gateway with an admin client; ``forget`` runs the command line in another process."""
    base = endless(base_of())
    with served(base, Bank.open(tiny_bank_folder, base), tmp_path, sweep=getattr(request, "param", 600.0)) as here:
        here.service.store.identity(write=True)  # mta serve asks for a store that is there
        with here.http("admin") as http:

            def forget():
                words = ["forget", "eve", "--bank", str(tiny_bank_folder), "--store", str(tmp_path / "people")]
                done = subprocess.run([sys.executable, "-m", "mta", *words], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr

            yield SimpleNamespace(http=http, service=here.service, store=here.service.store, forget=forget)


def personalized(http, items=ITEMS):
    http.post(f"{EVE}/history", json={"items": items})
    assert http.post(f"{EVE}/personalize").status_code == 202
    until(lambda: http.get(f"{EVE}/personalize").json()["status"] not in ("waiting", "running"))
    return http.get(f"{EVE}/personalize").json()["status"]


def test_items_from_before_a_tombstone_are_dropped_and_new_items_are_used(gateway):
    http = gateway.http
    assert http.post(f"{EVE}/history", json={"items": ITEMS[:3]}).json()["items"] == 3
    assert http.post(f"{EVE}/history", json={"items": ITEMS[:3], "keep": True}).status_code == 200
    gateway.forget()
    assert http.post(f"{EVE}/personalize").status_code == 400  # nothing is known of this person
    assert http.get(EVE).status_code == 404
    assert "eve" not in gateway.store
    assert personalized(http, ITEMS[3:]) == "done"
    assert (http.get(EVE).json()["items_held"], http.get(EVE).json()["version"]) == (1, 1)
    assert gateway.store.load("eve").history == people_of(1, items=4, seed=9)[0].latest(1).digest()


def test_what_a_person_asked_other_models_leaves_memory_when_forgotten_elsewhere(gateway):
    """With a key of their own; and the status of a job is gone at once."""
    service, http = gateway.service, gateway.http
    service.keys = Keys(keys=(*service.keys.keys, Key(name="eves", sha256="1" * 64, rights="person", scope="eve")))

    async def asked():
        async for _ in service.engine.answer(EngineRequest((7, 8, 9), TASK, max_tokens=2, asker="eves")):
            pass

    def owners():
        return {slot.owner for slot in service.engine.scheduler.slots._slots}

    assert personalized(http) == "done"
    asyncio.run(asked())
    asyncio.run(service.drop_forgotten_elsewhere())
    assert (TASK, "eves") in owners()
    gateway.forget()
    assert http.get(f"{EVE}/personalize").status_code == 404
    asyncio.run(service.drop_forgotten_elsewhere())
    assert (TASK, "eves") not in owners()
    http.post(f"{EVE}/history", json={"items": ITEMS})
    assert http.delete(EVE).status_code == 200


def test_a_running_job_saves_nothing_of_a_person_forgotten_elsewhere(gateway, monkeypatch):
    http, states, begun, going_on = gateway.http, Stages.states, threading.Event(), threading.Event()

    def slow(stages, cohort):
        made = states(stages, cohort)
        begun.set()
        assert going_on.wait(600)
        return made

    monkeypatch.setattr(Stages, "states", slow)
    for id in ("eve", "bob"):
        http.post(f"/v1/people/{id}/history", json={"items": ITEMS})
        assert http.post(f"/v1/people/{id}/personalize").status_code == 202
    assert begun.wait(600)
    gateway.forget()
    going_on.set()
    until(lambda: http.get("/v1/people/bob/personalize").json()["status"] == "done")
    assert http.get(EVE).status_code == http.get(f"{EVE}/personalize").status_code == 404
    assert ("eve" in gateway.store, "bob" in gateway.store) == (False, True)
    assert not Path(gateway.store.files.at(gateway.store._path("eve"))).exists()


def answered(http):
    found = http.post("/v1/completions", json={"model": "person:eve", "prompt": "x", "max_tokens": 2})
    return found.status_code == 200


@pytest.mark.parametrize("gateway", [0.02], indirect=True)
def test_a_gateway_drops_all_memory_of_a_person_forgotten_elsewhere(gateway):
    http, service = gateway.http, gateway.service
    assert personalized(http) == "done"
    assert answered(http)
    http.post("/v1/people/bob/history", json={"items": ITEMS})
    assert service.jobs.status("eve")
    gateway.forget()
    until(lambda: "eve" not in service.histories._held)
    until(lambda: "eve" not in service.jobs._entries)
    until(lambda: not [who for who in list(service.engine.activated) if getattr(who, "person", "") == "eve"])
    until(lambda: not [who for who in service.engine.scheduler.known() if getattr(who, "person", "") == "eve"])
    assert service.histories.held("bob") == len(ITEMS)


@pytest.mark.parametrize("again", [False, True])
def test_a_sweep_drops_a_version_that_is_gone_or_whose_number_now_has_other_content(gateway, again):
    http, service, store = gateway.http, gateway.service, gateway.store
    assert personalized(http) == "done"
    state = store.load("eve")
    store.tombstones.add("eve")
    assert answered(http)
    asyncio.run(service.drop_forgotten_elsewhere())
    assert _held(service) == {"eve"}  # her states are still there
    store.remove("eve")
    if again:
        assert store.save("eve", replace(state, w=tuple(-w for w in state.w), work="other")) == 1
    asyncio.run(service.drop_forgotten_elsewhere())
    assert _held(service) == set()


def test_a_sweep_drops_a_version_that_is_gone_and_keeps_the_persons_newer_one(gateway):
    """As after ``mta store gc``, or for a person who was forgotten and is personalized again."""
    http, service, store = gateway.http, gateway.service, gateway.store
    assert personalized(http) == "done"
    state = store.load("eve")
    assert answered(http)
    assert store.save("eve", replace(state, w=tuple(-w for w in state.w), work="other")) == 2
    assert answered(http)
    store.tombstones.add("eve")
    collect(store, keep=1)
    asyncio.run(service.drop_forgotten_elsewhere())
    assert {who.number for who in asyncio.run(service.engine.versions())} == {2}


def _held(service):
    known = (*service.engine.activated, *service.engine.scheduler.known())
    return {who.person for who in known if hasattr(who, "person")}


@pytest.mark.parametrize("swept", [False, True])
def test_a_person_saved_and_then_forgotten_elsewhere_within_one_job_has_no_status(gateway, monkeypatch, swept):
    http, update = gateway.http, Personalizer.update

    def forgotten_after(personal, *args, **how):
        done = update(personal, *args, **how)
        forget_person("eve", Store(gateway.store.files.url))
        if swept:
            asyncio.run(gateway.service.jobs.drop_forgotten())
            assert "eve" not in gateway.service.jobs._entries
        return done

    monkeypatch.setattr(Personalizer, "update", forgotten_after)
    http.post(f"{EVE}/history", json={"items": ITEMS})
    assert http.post(f"{EVE}/personalize").status_code == 202
    jobs = gateway.service.jobs
    until(lambda: not (jobs._running or jobs._waiting()))
    assert http.get(f"{EVE}/personalize").status_code == 404


def test_forgetting_names_a_bank_that_could_not_be_marked_to_the_operator(tiny_bank_folder, tmp_path):
    base = endless(base_of())
    folder = shutil.copytree(tiny_bank_folder, tmp_path / "bank")
    bank = Bank.open(folder, base)
    with served(base, bank, tmp_path, strict=(folder, bank.hash)) as here, here.http("admin") as http:
        (folder / "needs-rebuild.json" / "in the way").mkdir(parents=True)
        done = http.delete("/v1/people/t0").json()
        assert (done["needs_rebuild"], done["banks_unmarked"], list(done["banks"])) == (["task LoRA"], 1, [str(folder)])
        assert here.service.is_stale


def test_items_appended_while_the_person_is_forgotten_are_not_stored(gateway, monkeypatch):
    http, joined = gateway.http, Histories._joined
    assert http.post(f"{EVE}/history", json={"items": ITEMS[:2], "keep": True}).status_code == 200

    forgetting = threading.Thread(target=lambda: forget_person("eve", Store(gateway.store.files.url)))

    def late(histories, *given):
        forgetting.start()  # it waits for the lock that is held here, after it has written its tombstone
        until(lambda: gateway.store.tombstones.of("eve"))
        return joined(histories, *given)

    monkeypatch.setattr(Histories, "_joined", late)
    answer = http.post(f"{EVE}/history", json={"items": ITEMS[2:], "keep": True})
    forgetting.join()
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "person_forgotten")
    assert gateway.store.history("eve") is None
