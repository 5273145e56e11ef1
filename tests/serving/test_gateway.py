"""The gateway over HTTP: with OpenAI's client, and with unauthorized or malformed requests."""

import json
import random
import re
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx2
import openai
import pytest
from conftest import HashEncoder, people_of, personalizer
from served import endless, served, stepped
from tiny import base_of, random_loras

from mta.bank.bank import Bank
from mta.errors import PersonNotFound
from mta.model.generate import generate
from mta.personalize import forget_person, stages
from mta.personalize.adapters import row_adapters
from mta.personalize.likelihoods import shots_of
from mta.serving.api.completions import Text
from mta.serving.api.limits import Limits
from mta.serving.embedded.engine import EmbeddedEngine
from mta.store import Store
from mta.store.state import State

ASKED = [{"role": "user", "content": "Film 7"}]


@pytest.fixture(scope="module")
def world(tiny_bank_folder, tmp_path_factory):
    """A server with three people in its store: ann, bob, team/cy."""
    base = endless(base_of())
    bank, folder = Bank.open(tiny_bank_folder, base), tmp_path_factory.mktemp("served")
    with served(base, bank, folder, limits=Limits(forgets=0)) as here:
        for n, id in enumerate(("ann", "bob", "team/cy")):
            stack = random_loras(base, 1, rank=1, size=0.6, seed=n)
            state = State(bank.hash, (0, 1, 2), (30.0, -20.0, 5.0 * n), "fixed", "", f"work{n}", 0, stack)
            here.service.store.save(id, state)
        here.client = lambda name: openai.OpenAI(base_url=f"{here.url}/v1", api_key=here.secrets[name], max_retries=0)
        here.http = lambda name: httpx2.Client(
            timeout=60, base_url=here.url, headers={"Authorization": f"Bearer {here.secrets[name]}"} if name else {}
        )
        yield here


def shown(base, tokens):
    """The text of tokens as a client sees it."""
    text = Text(base.tokenizer)
    return "".join([*(text.add(token) for token in tokens), text.end()])


def said(client, model, **how):
    found = client.chat.completions.create(model=model, messages=ASKED, max_tokens=12, temperature=0, **how)
    return found.choices[0].message.content


def test_each_person_is_answered_by_their_own_model_streaming_or_not(world):
    client = world.client("serve")
    models = [world.service.base.name, "task", "person:ann", "person:ann#merged", "person:bob", "person:team/cy"]
    whole = {model: said(client, model) for model in models}
    assert len(set(whole.values())) == len(models)
    for model in models:
        stream = client.chat.completions.create(
            model=model,
            messages=ASKED,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
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


def test_n_stop_seed_and_logprobs(world):
    client = world.client("serve")
    how = {"model": "person:bob", "messages": ASKED, "max_tokens": 10, "temperature": 1.5, "seed": 5, "n": 3}
    first, again = (client.chat.completions.create(**how, logprobs=True, top_logprobs=2) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    for choice in first.choices:
        for token in choice.logprobs.content:
            assert token.top_logprobs[0].logprob >= token.logprob - 1e-6 or len(token.top_logprobs) == 2
    whole = said(client, "person:bob")
    stop = whole[4:6]
    assert said(client, "person:bob", stop=[stop]) == whole[: whole.index(stop)]


def test_models_lists_a_persons_own_model_and_no_other_persons(world):
    assert [m.id for m in world.client("ann").models.list()] == [world.service.base.name, "task", "person:ann"]
    assert [m.id for m in world.client("admin").models.list()] == [world.service.base.name, "task"]


@pytest.mark.parametrize(
    "model", ["person:bob", "person:nobody", "person:team/cy", "person:bob@v1", "person:ann@v9", "gpt-9", "person:"]
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


def test_strict_refuses_a_bank_that_contains_a_forgotten_person(tiny_bank_folder, tmp_path):
    base = endless(base_of())
    folder = shutil.copytree(tiny_bank_folder, tmp_path / "bank")
    bank = Bank.open(folder, base)
    with served(base, bank, tmp_path, strict=[folder]) as here:
        here.service.store.save("ann", State(bank.hash, (0,), (1.0,), "fixed", "", "work", 0))
        client = openai.OpenAI(base_url=f"{here.url}/v1", api_key=here.secrets["admin"], max_retries=0)
        assert said(client, "person:ann")
        assert said(client, "task")
        anchor = next(p.id for p in people_of(12, prefix="c") if bank.info.members.artefacts_of(p.id))
        admin = {"Authorization": f"Bearer {here.secrets['admin']}"}
        with httpx2.Client(base_url=here.url, headers=admin, timeout=60) as http:
            assert http.delete(f"/v1/people/{anchor}").json()["needs_rebuild"]
            for model in ("person:ann", "task"):
                with pytest.raises(openai.InternalServerError, match="rebuilt"):
                    said(client, model)
            assert said(client, base.name)
            assert http.post("/v1/people/ann/personalize").status_code == 503
            shutil.rmtree(folder)  # rebuilding does not change what this server has in memory
            with pytest.raises(openai.InternalServerError, match="rebuilt"):
                said(client, "task")


def test_without_strict_a_stale_bank_is_served(tiny_bank_folder, tmp_path):
    base = endless(base_of())
    folder = shutil.copytree(tiny_bank_folder, tmp_path / "bank")
    bank = Bank.open(folder, base)
    with served(base, bank, tmp_path) as here:
        client = openai.OpenAI(base_url=f"{here.url}/v1", api_key=here.secrets["admin"], max_retries=0)
        before = said(client, "task")
        anchor = next(p.id for p in people_of(12, prefix="c") if bank.info.members.artefacts_of(p.id))
        admin = {"Authorization": f"Bearer {here.secrets['admin']}"}
        with httpx2.Client(base_url=here.url, headers=admin, timeout=60) as http:
            assert http.delete(f"/v1/people/{anchor}").json()["needs_rebuild"]
        assert said(client, "task") == before


def test_people_are_served_while_moving_to_a_new_bank(tiny_bank_folder, tmp_path, cache):
    base = endless(base_of())
    old = Bank.open(tiny_bank_folder, base)
    build = {"task_people": people_of(4, prefix="t", seed=9), "task": old.task, "encoder": HashEncoder()}
    new = Bank.build(base, people_of(12, prefix="c", seed=9), tmp_path / "new", run=old.info.run, **build)
    people = [person.latest(4) for person in people_of(2, prefix="ann")]
    store = Store(tmp_path / "people")
    personalizer(base, old, store).personalize(people)
    engine = EmbeddedEngine(base, new, store, before=old, slots=4, chunk=32, length=256)
    with served(base, new, tmp_path, engine=engine, store=store) as here:
        client = openai.OpenAI(base_url=f"{here.url}/v1", api_key=here.secrets["admin"], max_retries=0)
        first = {name: said(client, f"person:{name}") for name in ("ann0", "ann1")}
        personalizer(base.twin(), new, store).personalize(people[:1])
        assert said(client, "person:ann0") != first["ann0"]
        assert said(client, "person:ann1") == first["ann1"]
        assert said(client, "person:ann0@v1") == first["ann0"]
    assert store.load("ann0").bank == new.hash


def test_a_prefix_key_reaches_only_its_own_people(world):
    assert said(world.client("team"), "person:team/cy") is not None
    with pytest.raises(openai.NotFoundError):
        said(world.client("team"), "person:ann")


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


@pytest.mark.parametrize("shown", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eDp5"}])
def test_requests_without_a_valid_key_are_refused(world, shown):
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/v1/people/ann")):
        body = {"model": "task", "messages": ASKED} if method == "POST" else None
        found = httpx2.request(method, world.url + path, headers=shown, json=body, timeout=60)
        assert found.status_code == 401
        assert found.json()["error"]["code"] == "invalid_api_key"
    assert (
        httpx2.get(f"{world.url}/healthz", timeout=60).status_code
        == httpx2.get(f"{world.url}/readyz", timeout=60).status_code
        == 200
    )


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


def test_a_long_body_is_refused(world):
    with world.http("serve") as http:
        found = http.post("/v1/chat/completions", content=b"x" * ((1 << 20) + 1))
        assert found.status_code == 413
        found = http.post("/v1/chat/completions", content=(b"x" * 1000 for _ in range(1100)))
        assert found.status_code == 413


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
        assert http.post(f"{where}/personalize").status_code == 202
        done = _waited(lambda: http.get(f"{where}/personalize").json())
        assert done == {"status": "done", "version": 1, "message": ""}
        kept = http.get(where).json()
        assert (kept["versions"], kept["items_kept"], kept["items_held"], len(kept["w"])) == ([1], 2, 4, 3)
        assert said(world.client("team"), "person:team/dee") is not None
        assert http.delete(where).json() == {
            "removed": True,
            "needs_rebuild": [],
            "exports_left": 0,
            "banks_unmarked": 0,
        }
        assert http.get(where).status_code == http.get(f"{where}/personalize").status_code == 404
    with pytest.raises(openai.NotFoundError):
        said(world.client("team"), "person:team/dee")
    with pytest.raises(PersonNotFound):
        world.service.store.load("team/dee")
    assert world.service.store.history("team/dee") is None


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
    listed = [model.id for model in world.client("ann").models.list()]
    assert ("person:ann" in listed) == ("ann" in world.service.store)


def test_a_diverged_person_fails_and_the_others_are_done(world, monkeypatch):
    jobs, people = world.service.jobs, people_of(2, items=3, prefix="astray")
    key = shots_of(world.service.jobs.personal.base, world.service.task, people[0]).key
    measured = stages.mean_nll
    nan = float("nan")
    monkeypatch.setattr(
        "mta.personalize.stages.mean_nll",
        lambda base, jobs, *more, **how: [
            nan if job.key == key else loss for job, loss in zip(jobs, measured(base, jobs, *more, **how))
        ],
    )
    for person in people:
        jobs.put(person)
    for person, state in zip(people, ("failed", "done")):
        assert _waited(lambda: {"status": jobs.status(person.id).state})["status"] == state  # noqa: B023
    assert "diverged" in jobs.status(people[0].id).message


def test_only_the_last_finished_statuses_are_kept(world, monkeypatch):
    monkeypatch.setattr("mta.serving.api.jobs.REMEMBERED", 1)
    jobs, people = world.service.jobs, people_of(3, items=2, prefix="many")
    for person in people:
        jobs.put(person)
        _waited(lambda: {"status": jobs.status(person.id).state})  # noqa: B023
    assert [jobs.status(person.id) and jobs.status(person.id).state for person in people] == [None, None, "done"]


def test_forgetting_during_other_requests_leaves_nothing(world):
    item = {"fields": dict(people_of(1, items=1)[0].items[0].fields)}
    where, store = "/v1/people/team/eve", world.service.store

    def busy(seed):
        draw = random.Random(seed)
        with world.http("team") as http:
            for _ in range(12):
                way = draw.choice(("keep", "hold", "personalize", "ask", "forget"))
                if way in ("keep", "hold"):
                    http.post(f"{where}/history", json={"items": [item], "keep": way == "keep"})
                elif way == "ask":
                    http.post("/v1/completions", json={"model": "person:team/eve", "prompt": "x", "max_tokens": 2})
                elif way == "personalize":
                    http.post(f"{where}/personalize")
                else:
                    assert http.delete(where, timeout=60).status_code == 200

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(busy, range(6)))
    with world.http("team") as http:
        assert http.delete(where, timeout=60).status_code == 200
        time.sleep(0.5)  # whatever was begun in spite of it would show by now
        assert http.get(where).status_code == http.get(f"{where}/personalize").status_code == 404
    assert (store.latest("team/eve"), store.history("team/eve")) == (None, None)
    assert not any(getattr(who, "person", "") == "team/eve" for who in list(world.service.engine.activated))


def test_metrics_count_and_contain_no_ids(world):
    said(world.client("serve"), "person:ann")
    text = httpx2.get(f"{world.url}/metrics", timeout=60).text
    for name in ("mta_requests_total", "mta_first_token_seconds_count", "mta_engine_merges", "mta_answer_tokens_total"):
        assert name in text
    for secret in ("ann", "bob", "team", "Film"):
        assert not re.search(f'[":]{secret}', text)


def test_only_an_admin_lists_the_models_in_memory(world):
    said(world.client("serve"), "person:ann")
    with world.http("admin") as http:
        listed = {one["id"] for one in http.get("/v1/adapters").json()["data"]}
    assert {re.sub("@v[0-9]+", "", name) for name in listed} >= {"person:ann"}
    for name in ("serve", "ann", "team"):
        with world.http(name) as http:
            refused = http.get("/v1/adapters")
            assert refused.status_code == 403
            assert "person:" not in refused.text


def test_files_contain_no_secret(world):
    for path in world.service.jobs.personal.bank.folder.parent.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".yaml"):
            assert not any(secret.encode() in path.read_bytes() for secret in world.secrets.values()), path


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


def test_token_offsets_continue_from_piece_to_piece(world):
    stream = world.client("serve").completions.create(
        model="person:bob", prompt="hello", max_tokens=6, temperature=0, logprobs=1, stream=True
    )
    places = [at for c in stream for one in c.choices if one.logprobs for at in one.logprobs.text_offset]
    assert len(places) == 6
    assert places == sorted(set(places))


def test_a_person_key_cannot_take_all_slots(world):
    for _ in range(2):  # what was refused holds nothing
        with pytest.raises(openai.RateLimitError, match="at most 8 answers at once"):
            world.client("ann").completions.create(model="task", prompt="x", max_tokens=2, n=9)
        assert len(world.client("ann").completions.create(model="task", prompt="x", max_tokens=2, n=8).choices) == 8


def test_without_keys_only_this_machine_is_served(tiny, tmp_path):
    base, bank = tiny
    with served(base, bank, tmp_path, keyless=True) as here:
        own = {"Host": here.url.removeprefix("http://")}
        shown = [{}, own | {"Origin": here.url}, own | {"Origin": "http://evil.example"}, {"Host": "evil.example"}]
        codes = [httpx2.get(f"{here.url}/v1/models", headers=headers, timeout=60).status_code for headers in shown]
        assert codes == [200, 200, 403, 403]


def test_a_disconnect_before_the_answer_frees_the_slot(tiny, tmp_path):
    base, bank = tiny
    with served(endless(base), bank, tmp_path, slots=1, length=500) as here:
        headers = {"Authorization": f"Bearer {here.secrets['serve']}"}
        body = {"model": "task", "prompt": "x", "max_tokens": 400, "temperature": 0}
        scheduler = here.service.engine.scheduler
        scheduler.stops = frozenset()  # random weights may choose any token
        with stepped(scheduler) as steps:
            address = ("127.0.0.1", int(here.url.rpartition(":")[2]))
            with socket.create_connection(address) as caller:
                data = json.dumps(body)
                head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {headers['Authorization']}\r\n"
                caller.sendall(
                    f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n{data}".encode()
                )
                steps.release(3)
                _waited(lambda: {"status": "running" if scheduler.running == 0 else "done"})
            (row,) = scheduler.rows  # the engine stands still: it is not done
            _waited(lambda: {"status": "done" if row.cancelled else "running"})
            assert row.count < 10
        found = httpx2.post(f"{here.url}/v1/completions", json=body | {"max_tokens": 3}, headers=headers, timeout=60)
        assert found.status_code == 200
        assert row.count < 10


def test_too_many_requests_get_a_429_with_retry_after(tiny, tmp_path):
    base, bank = tiny
    with served(base, bank, tmp_path, slots=1, waiting=1) as here:
        headers = {"Authorization": f"Bearer {here.secrets['serve']}"}
        body = {"model": "task", "messages": ASKED, "max_tokens": 60, "n": 6}
        found = httpx2.post(f"{here.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert (found.status_code, found.json()["error"]["code"]) == (429, "queue_full")
        assert int(found.headers["Retry-After"]) >= 1
    with served(base, bank, tmp_path / "rate", limits=Limits(rate=2)) as here:
        headers = {"Authorization": f"Bearer {here.secrets['serve']}"}
        codes = [httpx2.get(f"{here.url}/v1/models", headers=headers, timeout=60).status_code for _ in range(3)]
        assert codes == [200, 200, 429]


def test_forgetting_is_rate_limited_for_person_and_prefix_keys_but_not_for_operators(tiny, tmp_path):
    with served(*tiny, tmp_path, limits=Limits(forgets=2)) as here:
        store = here.service.store
        store.identity(write=True)

        def forget(name, person):
            headers = {"Authorization": f"Bearer {here.secrets[name]}"}
            return httpx2.delete(f"{here.url}/v1/people/{person}", headers=headers, timeout=60)

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
    with served(endless(base), bank, tmp_path, slots=1, length=500) as here:
        headers = {"Authorization": f"Bearer {here.secrets['serve']}"}
        body = {"model": "task", "prompt": "x", "max_tokens": 400, "stream": True, "temperature": 0}
        here.service.engine.scheduler.stops = frozenset()  # random weights may choose any token
        with httpx2.stream("POST", f"{here.url}/v1/completions", json=body, headers=headers, timeout=60) as stream:
            next(stream.iter_lines())
        _waited(lambda: {"status": "done" if here.service.engine.facts()["running"][0] == 0 else "running"}, seconds=60)
        found = httpx2.post(
            f"{here.url}/v1/completions", json=body | {"stream": False, "max_tokens": 3}, headers=headers, timeout=60
        )
        assert found.json()["usage"]["completion_tokens"] <= 3


def test_a_stopping_server_finishes_running_answers(tiny, tmp_path):
    base, bank = tiny
    with served(endless(base), bank, tmp_path) as here:
        client = openai.OpenAI(base_url=f"{here.url}/v1", api_key=here.secrets["serve"], max_retries=0)
        stream = client.completions.create(model="task", prompt="x", max_tokens=150, temperature=0, stream=True)
        next(iter(stream))
        here.server.should_exit = True
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason in ("length", "stop")
        here.thread.join(60)
        assert not here.service.engine.ready


def _waited(ask, seconds=60):
    until = time.monotonic() + seconds
    while (found := ask())["status"] in ("waiting", "running") and time.monotonic() < until:
        time.sleep(0.05)
    return json.loads(json.dumps(found))
