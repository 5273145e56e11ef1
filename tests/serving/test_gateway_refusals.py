"""Requests that the gateway refuses: their codes, their metrics, and fallbacks."""

import httpx2
import pytest
from gateway import ASKED
from gateway import world as world  # the fixture

from mta.errors import StateCorrupt, StoreError
from mta.store import Store

BODIES = {
    "chat": ("/v1/chat/completions", {"messages": ASKED}),
    "completion": ("/v1/completions", {"prompt": "Film 7"}),
    "classify": ("/v1/classify", {"input": "Film 7"}),
}


def count(world, kind, status):
    name = f'mta_requests_total{{kind="{kind}",status="{status}"}} '
    lines = httpx2.get(f"{world.url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize(("model", "text", "status"), [("person:nobody", "Film 7", 404), ("task", "x" * 10**5, 400)])
def test_requests_that_are_refused_before_they_reach_the_engine_are_counted(world, kind, model, text, status):
    (path, body), before = BODIES[kind], count(world, kind, status)
    (name,) = body
    with world.http("serve") as http:
        found = http.post(path, json={"model": model, name: [ASKED[0] | {"content": text}] if kind == "chat" else text})
    assert found.status_code == status
    assert count(world, kind, status) == before + 1


@pytest.mark.parametrize("kind", BODIES)
def test_a_store_that_does_not_answer_is_a_503_and_counted(world, monkeypatch, kind):
    def unavailable(*_):
        raise StoreError("s3://secret cannot be read or written", hint="Check the store's address.")

    monkeypatch.setattr(Store, "latest", unavailable)
    (path, body), before = BODIES[kind], count(world, kind, 503)
    with world.http("serve") as http:
        found = http.post(path, json=body | {"model": "person:ann"})
    assert (found.status_code, found.json()["error"]["code"]) == (503, "store_unavailable")
    assert int(found.headers["Retry-After"]) >= 1
    assert "s3" not in found.text
    assert count(world, kind, 503) == before + 1


def test_a_damaged_state_is_a_500_without_a_time_to_retry(world, monkeypatch):
    def damaged(*_):
        raise StateCorrupt("/secret was changed", hint="mta personalize")

    monkeypatch.setattr(Store, "load", damaged)
    with world.http("serve") as http:
        found = http.post("/v1/completions", json={"model": "person:team%2Fcy#merged", "prompt": "x"})
    assert (found.status_code, found.json()["error"]["code"]) == (500, "StateCorrupt")
    assert "Retry-After" not in found.headers
