"""Requests that the gateway refuses: their codes, their metrics, and fallbacks."""

import httpx2
import openai
import pytest
from fastapi.exceptions import RequestValidationError
from gateway import ASKED
from gateway import world as world  # the fixture

from mta.errors import StateCorrupt, StoreError
from mta.store import Store
from mta.store.state import State

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


@pytest.mark.parametrize("kind", BODIES)
def test_a_state_of_another_bank_is_a_503_and_a_fallback_answers(world, kind):
    world.service.store.save("moving", State("another bank", (0,), (1.0,), "fixed", "", "work", 0))
    path, body = BODIES[kind]
    body |= {"model": "person:moving"}
    with world.http("serve") as http:
        found = http.post(path, json=body)
        assert (found.status_code, found.json()["error"]["code"]) == (503, "other_bank")
        assert "mta personalize" not in found.text  # a hint for the operator
        refused = count(world, kind, 503)
        for fallback, name in (("task", "task"), ("base", world.service.base.name)):
            answer = http.post(path, json=body | {"fallback": fallback})
            assert (answer.status_code, answer.json()["model"]) == (200, name)
        if kind != "classify":
            stream = http.post(path, json=body | {"fallback": "task", "stream": True, "max_tokens": 2})
            assert '"model": "task"' in stream.text
            assert stream.text.endswith("data: [DONE]\n\n")
    assert count(world, kind, 503) == refused > 0  # what a fallback answers is not an error


def test_a_prompt_that_is_too_long_has_openais_code(world):
    with pytest.raises(openai.BadRequestError) as error:
        world.client("serve").completions.create(model="task", prompt="x" * 400, max_tokens=5)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as error:
        world.client("serve").completions.create(model="task", prompt="", max_tokens=5)
    assert error.value.code is None


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/people/ann/history", {"items": [1] * 100_000}),
        ("/v1/chat/completions", {"model": "task", "messages": [{"role": "user", "content": [1] * 100_000}]}),
    ],
)
def test_a_list_of_wrong_elements_is_refused_at_the_first(world, path, body):
    """An error for each element would take seconds, in which nobody else is answered."""
    seen, errors = [], RequestValidationError.errors

    def watched(self):
        found = errors(self)
        seen.append(len(found))
        return found

    with pytest.MonkeyPatch.context() as patch, world.http("admin") as http:
        patch.setattr(RequestValidationError, "errors", watched)
        assert http.post(path, json=body).status_code == 400
    assert max(seen) <= 2  # one for each form that is accepted


def test_more_items_than_a_history_may_have_are_refused_before_each_is_read(world, monkeypatch):
    monkeypatch.setattr("mta.serving.api.people._item", None)
    with world.http("admin") as http:
        found = http.post("/v1/people/ann/history", json={"items": [{"fields": {}}] * 1000})
    assert (found.status_code, "at most 512 items, this one would have 1000" in found.text) == (400, True), found.text


def test_a_body_without_its_content_type_is_explained(world):
    with world.http("admin") as http:
        found = http.post("/v1/completions", content=b'{"model": "task", "prompt": "x"}')
    assert found.status_code == 400
    assert "send the header Content-Type: application/json" in found.json()["error"]["message"]


def test_proxies_do_not_hold_back_the_events_of_a_stream(world):
    body = {"model": "task", "prompt": "x", "max_tokens": 2, "stream": True}
    with world.http("serve") as http, http.stream("POST", "/v1/completions", json=body) as found:
        assert (found.headers["Cache-Control"], found.headers["X-Accel-Buffering"]) == ("no-cache", "no")
        assert b"[DONE]" in found.read()
