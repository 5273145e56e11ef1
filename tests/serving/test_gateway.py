"""The gateway over HTTP: with OpenAI's client, and with unauthorized or malformed requests."""

import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace

import httpx2
import jinja2
import openai
import pytest
from conftest import people_of
from gateway import ASKED, said, shown
from gateway import world as world  # the fixture
from served import served
from tiny import base_of, endless

from mta.bank.bank import Bank
from mta.bank.format import INFO, read_info, with_hash, write_info
from mta.model.generate import generate
from mta.personalize.adapters import row_adapters
from mta.serving.api.auth import LOCAL
from mta.serving.api.metrics import Metrics
from mta.store.state import State


def test_each_person_is_answered_by_their_own_model_streaming_or_not(world):
    client = world.client("serve")
    models = [world.service.base.name, "task", "person:ann", "person:ann#merged", "person:bob", "person:team/cy"]
    whole = {model: said(client, model) for model in models}
    assert len(set(whole.values())) == len(models)
    for model in models:
        how = {"max_tokens": 12, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        chunks = list(client.chat.completions.create(model=model, messages=ASKED, **how))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole[model]
        assert chunks[-2].choices[0].finish_reason in ("length", "stop")
        assert chunks[-1].usage.completion_tokens <= 12
    assert said(client, "person:ann@v1") == whole["person:ann"]


def test_answers_equal_those_of_the_library(world):
    client, service = world.client("serve"), world.service
    prompt = service.base.prompts.chat(ASKED)
    found = client.completions.create(model="person:bob", prompt="hello", max_tokens=9, temperature=0, logprobs=2)
    bank = service.engine.bank
    adapters = row_adapters(service.base, bank, [service.store.load("bob")])
    base = service.jobs.personal.base  # modules of their own: the engine goes on meanwhile
    (tokens,) = generate(base, [prompt], [0], adapters, max_new_tokens=12)
    assert said(client, "person:bob") == shown(service.base, tokens)
    (tokens,) = generate(base, [service.base.prompts.text("hello")], [0], adapters, max_new_tokens=9)
    assert found.choices[0].text == shown(service.base, tokens) != ""
    assert len(found.choices[0].logprobs.token_logprobs) == found.usage.completion_tokens
    assert all(p <= 0 for p in found.choices[0].logprobs.token_logprobs)


def test_default_max_tokens_is_the_tasks_limit_for_people_and_the_remaining_length_for_the_base(world):
    client, counts = world.client("serve"), {}
    for model in ("person:ann", "task", world.service.base.name):
        found = client.chat.completions.create(model=model, messages=ASKED, temperature=0, stop=["no such text"])
        counts[model] = found.usage.completion_tokens
    longest = world.service.base.prompts.answer_tokens(world.service.task)
    assert counts["person:ann"] == counts["task"] == longest < 12
    assert counts[world.service.base.name] > 12


def test_stop_seed_and_logprobs(world):
    client = world.client("serve")
    how = {"model": "person:bob", "messages": ASKED, "max_tokens": 10, "temperature": 1.5}
    sampled = [client.chat.completions.create(**how, seed=n, logprobs=True, top_logprobs=2) for n in (5, 5, 6)]
    first, again, other = (found.choices[0] for found in sampled)
    assert first.message.content == again.message.content != other.message.content
    for token in first.logprobs.content:
        likeliest, second = token.top_logprobs
        assert likeliest.logprob >= second.logprob
        assert likeliest.logprob >= token.logprob
    whole = said(client, "person:bob")
    stop = whole[4:6]
    assert said(client, "person:bob", stop=[stop]) == whole[: whole.index(stop)]


def test_the_store_is_not_read_for_people_that_a_key_may_not_ask(world, monkeypatch):
    read = []
    latest = type(world.service.store).latest
    monkeypatch.setattr(type(world.service.store), "latest", lambda store, id: (read.append(id), latest(store, id))[1])
    with pytest.raises(openai.NotFoundError):
        said(world.client("ann"), "person:bob")
    assert "bob" not in read
    said(world.client("ann"), "person:ann")
    assert "ann" in read


def test_metrics_count_every_answer_of_a_request(world):
    service = replace(world.service, metrics=Metrics())
    with service.counted("chat", LOCAL, 3):
        assert b"mta_open_answers 3.0" in service.metrics.text({})
    assert b"mta_open_answers 0.0" in service.metrics.text({})


def test_models_lists_a_persons_own_model_and_no_other_persons(world):
    assert [m.id for m in world.client("ann").models.list()] == [world.service.base.name, "task", "person:ann"]
    assert [m.id for m in world.client("admin").models.list()] == [world.service.base.name, "task"]


@pytest.mark.parametrize(
    "model", ["person:bob", "person:nobody", "person:anna", "person:bob@v1", "person:ann@v9", "gpt-9", "person:"]
)
def test_forbidden_and_unknown_people_get_the_same_answer(world, model):
    with pytest.raises(openai.NotFoundError) as error:
        said(world.client("ann"), model)
    assert error.value.code == "model_not_found"
    message = error.value.body["message"].replace(model, "X")
    assert message == (
        "the model 'X' does not exist, or this key may not use it. "
        "GET /v1/models lists available models; with fallback: task the pooled model answers instead."
    )


@pytest.mark.parametrize("model", ["person:bob", "person:nobody", "person:ann@v9"])
@pytest.mark.parametrize("fallback", ["task", "base"])
def test_fallback_answers_for_unknown_and_forbidden_people(world, model, fallback):
    """Unknown and forbidden people get the same answer, and the answer names its model."""
    client, name = world.client("ann"), fallback if fallback == "task" else world.service.base.name
    found = client.chat.completions.create(
        model=model, messages=ASKED, max_tokens=12, temperature=0, extra_body={"fallback": fallback}
    )
    assert found.model == name
    assert found.choices[0].message.content == said(client, name)
    own = client.chat.completions.create(
        model="person:ann", messages=ASKED, max_tokens=12, temperature=0, extra_body={"fallback": fallback}
    )
    assert (own.model, own.choices[0].message.content) == ("person:ann", said(client, "person:ann"))


@pytest.fixture
def banked(tiny_bank_folder, tmp_path):
    """A server over a bank of its own, for ``strict`` or not, and a person of the bank's anchors."""

    @contextmanager
    def of(strict):
        base, folder = endless(base_of()), shutil.copytree(tiny_bank_folder, tmp_path / "bank")
        bank = Bank.open(folder, base)
        with served(base, bank, tmp_path, strict=(folder, bank.hash) if strict else None) as here:
            here.service.store.save("ann", State(bank.hash, (0,), (1.0,), "fixed", "", "work", 0))
            here.anchor = next(p.id for p in people_of(12, prefix="c") if bank.info.members.parts_of(p.id))
            here.folder, here.base = folder, base.name
            yield here

    return of


def test_strict_refuses_a_bank_that_contains_a_forgotten_person(banked):
    with banked(strict=True) as here, here.http("admin") as http:
        client = here.client("admin")
        assert said(client, "person:ann")
        assert said(client, "task")
        assert http.delete(f"/v1/people/{here.anchor}").json()["needs_rebuild"]
        for model in ("person:ann", "task"):
            with pytest.raises(openai.InternalServerError, match="rebuilt"):
                said(client, model)
        assert said(client, here.base)
        assert http.post("/v1/people/ann/personalize").status_code == 503
        shutil.rmtree(here.folder)  # rebuilding does not change what this server has in memory
        with pytest.raises(openai.InternalServerError, match="rebuilt"):
            said(client, "task")


def test_strict_refuses_a_bank_whose_folder_was_replaced_meanwhile(banked):
    """The rebuilt bank has no note of the forgotten person, whom the one in memory may still contain."""
    with banked(strict=True) as here:
        client = here.client("admin")
        assert said(client, "task")
        hidden = (here.folder / INFO).rename(here.folder / "hidden")
        with pytest.raises(openai.InternalServerError):
            said(client, "task")
        hidden.rename(here.folder / INFO)
        assert said(client, "task")
        write_info(here.folder, with_hash(read_info(here.folder).model_copy(update={"work": "another"})))
        with pytest.raises(openai.InternalServerError, match="its folder holds another bank by now"):
            said(client, "task")
        assert said(client, here.base)


def test_without_strict_a_stale_bank_is_served(banked):
    with banked(strict=False) as here, here.http("admin") as http:
        before = said(here.client("admin"), "task")
        assert http.delete(f"/v1/people/{here.anchor}").json()["needs_rebuild"]
        assert said(here.client("admin"), "task") == before


@pytest.mark.parametrize("path", ["", "/personalize"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_no_route_reveals_another_person_to_a_person_key(world, path, method):
    with world.http("ann") as http, world.http("serve") as serve:
        found = [
            h.request(method, f"/v1/people/{id}{path}") for h, id in ((http, "bob"), (http, "nobody"), (serve, "bob"))
        ]
    assert len({(one.status_code, one.text) for one in found}) == 1
    assert found[0].status_code in (404, 405)
    assert world.service.store.latest("bob") == 1


@pytest.mark.parametrize("ending", ["", "/personalize", "/history"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_a_line_break_in_a_path_leads_to_nobody_else(world, method, ending):
    item = {"fields": dict(people_of(1, items=1)[0].items[0].fields)}
    with world.http("admin") as http:
        body = {"items": [item]} if ending == "/history" else None
        found = http.request(method, f"/v1/people/bob{ending}%0A", json=body if method == "POST" else None)
    assert found.status_code in (404, 405)
    assert (world.service.store.latest("bob"), world.service.histories.held("bob")) == (1, 0)


@pytest.mark.parametrize("keep", [True, False])
def test_a_key_appends_nothing_to_another_person(world, keep):
    item = {"fields": dict(people_of(1, items=1)[0].items[0].fields)}
    for key in ("ann", "team", "serve"):
        with world.http(key) as http:
            found = http.post("/v1/people/bob/history", json={"items": [item], "keep": keep})
        assert found.status_code == 404
    assert (world.service.store.history("bob"), world.service.histories.held("bob")) == (None, 0)


def test_every_route_but_those_of_the_operator_needs_a_key(world):
    paths = httpx2.get(f"{world.url}/openapi.json", timeout=60).json()["paths"]
    assert len(paths) > 8
    free = set()
    for path, methods in paths.items():
        for method in methods:
            where = world.url + re.sub(r"{[^}]+}", "bob", path)
            found = httpx2.request(method, where, json={} if method == "post" else None, timeout=60)
            free |= {path} if found.status_code != 401 else set()
    assert free == {"/healthz", "/readyz", "/metrics"}


@pytest.mark.parametrize("shown", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eDp5"}])
def test_requests_without_a_valid_key_are_refused(world, shown):
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/v1/people/ann")):
        body = {"model": "task", "messages": ASKED} if method == "POST" else None
        found = httpx2.request(method, world.url + path, headers=shown, json=body, timeout=60)
        assert found.status_code == 401
        assert found.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"tools": []}, "tools"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 400}]}, "more than 256"),
        ({"max_tokens": 100_000}, "at most 1024 tokens"),
        ({"n": 99}, "n"),
    ],
)
def test_bad_requests_get_an_explanation(world, change, named):
    with world.http("serve") as http:
        found = http.post("/v1/chat/completions", json={"model": "task", "messages": ASKED, "max_tokens": 5} | change)
    assert found.status_code == 400
    assert named in found.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Great \ud83d"}]}),
        ("/v1/chat/completions", {"messages": ASKED, "stop": "\ud83d"}),
        ("/v1/completions", {"prompt": "Great \ud83d"}),
        ("/v1/classify", {"input": ["Great", "\ud83d"]}),
        ("/v1/people/eve/history", {"items": [{"fields": {"title": "\ud83d"}}]}),
        ("/v1/people/eve/history", {"items": [{"fields": {"\ud83d": "Alien"}}]}),
    ],
)
def test_half_of_a_surrogate_pair_is_refused(world, path, body):
    """A client that cuts text inside an emoji sends it as well-formed JSON."""
    body = body if "people" in path else {"model": "task"} | body
    with world.http("admin") as http:
        found = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert found.status_code == 400
    assert found.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_not_json_is_explained(world):
    with world.http("admin") as http:
        headers = {"Content-Type": "application/json"}
        found = http.post("/v1/completions", content=b'{"model": "task",', headers=headers)
    assert (found.status_code, found.json()["error"]["param"]) == (400, None)
    assert found.json()["error"]["message"] == "the body is not JSON, at character 17"


def test_messages_that_the_bases_template_rejects_are_refused_with_its_reason(world, monkeypatch):
    def strict(*_, **__):
        raise jinja2.TemplateError("roles must alternate")

    monkeypatch.setattr(world.service.base.tokenizer, "apply_chat_template", strict)
    with pytest.raises(openai.BadRequestError, match="the base's chat template rejects these messages"):
        said(world.client("serve"), "task")


def test_a_long_body_is_refused(world):
    with world.http("serve") as http:
        found = http.post("/v1/chat/completions", content=b"x" * ((1 << 20) + 1))
        assert found.status_code == 413
        found = http.post("/v1/chat/completions", content=(b"x" * 1000 for _ in range(1100)))
        assert found.status_code == 413


@pytest.mark.parametrize(
    "odd", [{"temperature": 1e-40}, {"top_p": 1e-60, "temperature": 2}, {"n": None, "stream": None}]
)
def test_odd_numbers_and_nulls_do_not_stop_the_engine(world, odd):
    with world.http("serve") as http:
        found = http.post("/v1/chat/completions", json={"model": "task", "messages": ASKED, "max_tokens": 4} | odd)
        assert found.status_code == 200
        assert http.get("/readyz").json() == {"ready": True}


def test_cached_token_counts_do_not_reveal_another_callers_prompts(world):
    asked = {"model": "task", "prompt": "a prompt that only one of them has sent so far", "max_tokens": 2}
    cached = [
        world.client(name).completions.create(**asked).usage.prompt_tokens_details.cached_tokens
        for name in ("ann", "team", "ann")
    ]
    assert cached[:2] == [0, 0]
    assert cached[2] > 10
