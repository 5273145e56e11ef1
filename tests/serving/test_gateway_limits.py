"""The gateway at its limits: too many requests, disconnects, and a stop."""

import dataclasses
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx2
from fastapi import HTTPException
from served import served, stepped, until
from tiny import endless

from mta.serving import launch
from mta.serving.api import limits
from mta.serving.api.limits import Limits, Rate
from mta.serving.api.service import Service
from mta.store import Store
from mta.store.tombstones import LIFETIME

ASK = {"model": "task", "prompt": "x", "max_tokens": 3}


def test_without_keys_only_this_machine_is_served(tiny, tmp_path):
    base, bank = tiny
    with served(base, bank, tmp_path, keyless=True) as here:
        own = {"Host": here.url.removeprefix("http://")}
        shown = [{}, own | {"Origin": here.url}, own | {"Origin": "http://evil.example"}, {"Host": "evil.example"}]
        codes = [httpx2.get(f"{here.url}/v1/models", headers=headers, timeout=60).status_code for headers in shown]
        assert codes == [200, 200, 403, 403]


def test_a_store_that_hangs_stops_no_answers_of_the_pooled_model(tiny, tmp_path, monkeypatch):
    """More requests wait for it than a server has threads."""
    base, bank = tiny
    asked, go_on = [], threading.Event()

    def latest(store, person):
        asked.append(person)
        assert go_on.wait(60)

    with served(base, bank, tmp_path, strict=(bank.folder, bank.hash)) as here:
        monkeypatch.setattr(Store, "latest", latest)

        def ask(model):
            with here.http("serve") as http:
                return http.post("/v1/completions", json=ASK | {"model": model}).status_code

        with ThreadPoolExecutor(50) as callers:
            waiting = [callers.submit(ask, f"person:x{n}") for n in range(50)]
            until(lambda: len(asked) >= 40)
            assert ask("task") == 200
            assert not any(one.done() for one in waiting)
            go_on.set()
            assert {one.result() for one in waiting} == {404}


def test_long_prompts_of_a_person_key_delay_no_other_caller(tiny, tmp_path, monkeypatch):
    """There are more of them than threads that tokenize."""
    base, bank = tiny
    begun, go_on, plain = [], threading.Event(), Service.chat_tokens

    def chat_tokens(service, turns):
        if turns[0]["content"] == "long":
            begun.append(1)
            assert go_on.wait(60)
        return plain(service, turns)

    monkeypatch.setattr(Service, "chat_tokens", chat_tokens)
    with served(base, bank, tmp_path) as here, ThreadPoolExecutor(8) as callers:

        def ask(name, text):
            body = {"model": "task", "messages": [{"role": "user", "content": text}], "max_tokens": 1}
            with here.http(name) as http:
                return http.post("/v1/chat/completions", json=body).status_code

        waiting = [callers.submit(ask, "ann", "long") for _ in range(6)]
        until(lambda: begun)
        assert ask("serve", "short") == 200
        assert len(begun) == 1
        go_on.set()
        assert {one.result() for one in waiting} == {200}


def test_a_disconnect_before_the_answer_frees_the_slot(tiny, tmp_path):
    base, bank = tiny
    with served(endless(base), bank, tmp_path, slots=1, length=500) as here:
        scheduler = here.service.engine.scheduler
        scheduler.stops = frozenset()  # random weights may choose any token
        with stepped(scheduler) as steps:
            address = ("127.0.0.1", int(here.url.rpartition(":")[2]))
            with socket.create_connection(address) as caller:
                data = json.dumps(ASK | {"max_tokens": 400, "temperature": 0})
                head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {here.secrets['serve']}\r\n"
                caller.sendall(
                    f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n{data}".encode()
                )
                steps.release(3)
                until(lambda: scheduler.running)
            (row,) = scheduler.rows  # the engine stands still: it is not done
            until(lambda: row.cancelled)
            assert row.count < 10
        with here.http("serve") as http:
            assert http.post("/v1/completions", json=ASK).status_code == 200
        assert row.count < 10


def test_a_body_that_arrives_too_slowly_gets_a_408(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "_PATIENCE", 0.2)
    with (
        served(*tiny, tmp_path) as here,
        socket.create_connection(("127.0.0.1", int(here.url.rpartition(":")[2])), timeout=60) as caller,
    ):
        caller.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        head, _, body = b"".join(iter(lambda: caller.recv(4096), b"")).decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 408")
    assert "connection: close" in head.lower()
    assert "did not arrive within" in body


def test_too_many_requests_get_a_429_with_retry_after(tiny, tmp_path):
    base, bank = tiny
    with served(base, bank, tmp_path, slots=1, waiting=1) as here, here.http("serve") as http:
        here.service.answers.used[""] += 2
        found = http.post("/v1/completions", json=ASK)
        assert (found.status_code, found.json()["error"]["code"]) == (429, "queue_full")
        assert int(found.headers["Retry-After"]) >= 1
    with served(base, bank, tmp_path / "rate", limits=Limits(rate=2)) as here, here.http("serve") as http:
        assert [http.get("/v1/models").status_code for _ in range(3)] == [200, 200, 429]


def test_no_minute_has_more_requests_than_the_rate(monkeypatch):
    now, rate, accepted = 0.0, Rate(10), []
    monkeypatch.setattr("mta.serving.api.limits.time.monotonic", lambda: now)

    def wait():
        try:
            return rate.count("ann") or 0
        except HTTPException as refused:
            return int(refused.headers["Retry-After"])

    for _ in range(3000):
        now += 0.125
        if seconds := wait():
            assert accepted[-10] + 60 - now <= seconds <= 60
        else:
            accepted.append(now)
    assert all(later - earlier >= 60 for earlier, later in zip(accepted, accepted[10:]))
    assert len(accepted) == 70  # 375 seconds: ten at once, and ten again in each new minute


def test_what_security_md_promises_is_the_default():
    text = " ".join((Path(__file__).parents[2] / "SECURITY.md").read_text().split())
    (sweep,) = (field.default for field in dataclasses.fields(Service) if field.name == "sweep")
    assert f"within about {sweep:.0f} seconds" in text
    assert f"stays for {LIFETIME / 86400:.0f} days" in text
    assert f"up to {Limits().forgets} times a minute" in text


def test_forgetting_is_rate_limited_for_person_and_prefix_keys_but_not_for_operators(tiny, tmp_path):
    with served(*tiny, tmp_path, limits=Limits(forgets=2)) as here:
        store = here.service.store
        store.identity(write=True)

        def forget(name, person):
            with here.http(name) as http:
                return http.delete(f"/v1/people/{person}")

        assert [forget("ann", "ann").status_code for _ in range(2)] == [200, 200]
        noted = store.tombstones.of("ann")
        assert noted
        assert forget("ann", "ann").status_code == 429
        assert int(forget("ann", "ann").headers["Retry-After"]) >= 1
        assert forget("ann", "bob").status_code == 404  # not hers: that says nothing of how often she came
        assert store.tombstones.of("ann") == noted  # whoever is refused writes nothing
        assert [forget("team", f"team/{n}").status_code for n in range(3)] == [200, 200, 429]
        assert [forget("admin", "ann").status_code for _ in range(3)] == [200] * 3


def test_a_disconnect_during_a_stream_frees_the_slot(tiny, tmp_path):
    base, bank = tiny
    with served(endless(base), bank, tmp_path, slots=1, length=500) as here, here.http("serve") as http:
        here.service.engine.scheduler.stops = frozenset()  # random weights may choose any token
        body = ASK | {"max_tokens": 400, "stream": True, "temperature": 0}
        with http.stream("POST", "/v1/completions", json=body) as stream:
            next(stream.iter_lines())
        until(lambda: here.service.engine.facts()["running"][0] == 0, seconds=60)
        assert http.post("/v1/completions", json=ASK).json()["usage"]["completion_tokens"] <= 3


def test_a_person_key_has_at_most_its_share_of_answers_at_once(tiny, tmp_path):
    base, bank = tiny
    with served(base, bank, tmp_path, limits=Limits(own=1)) as here, here.http("ann") as http:
        running, ask = here.service.answers.used, partial(http.post, "/v1/completions", json=ASK)
        with ThreadPoolExecutor(2) as callers:
            with stepped(here.service.engine.scheduler):
                first = callers.submit(ask)
                until(lambda: running.total())
                refused, other = ask(), callers.submit(here.http("serve").post, "/v1/completions", json=ASK)
                until(lambda: running.total() == 2)
            assert (refused.status_code, "at most 1 at once" in refused.text) == (429, True)
            assert [one.result().status_code for one in (first, other)] == [200, 200]


def test_a_stopping_server_finishes_running_answers(tiny, tmp_path):
    base, bank = tiny
    with served(endless(base), bank, tmp_path) as here:
        how = {"max_tokens": 150, "temperature": 0, "stream": True}
        stream = here.client("serve").completions.create(model="task", prompt="x", **how)
        next(iter(stream))
        here.server.should_exit = True
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        here.thread.join(60)
        assert not here.service.engine.ready


def test_running_answers_have_30_seconds_when_the_gateway_stops(monkeypatch):
    configs = []
    server = SimpleNamespace(run=lambda sockets: None)
    monkeypatch.setattr(launch.uvicorn, "Server", lambda config: configs.append(config) or server)
    launch.serve(SimpleNamespace(limits=Limits()), "127.0.0.1", 0, lambda _: None)
    assert configs[0].timeout_graceful_shutdown == 30
