"""``mta doctor --served``: a server's log probabilities against those of the code that trained the models."""

import http.server
import json
import threading
from contextlib import contextmanager

import pytest
from conftest import personalizer
from served import served
from tiny import base_of, endless, random_loras

from mta.bank.bank import Bank
from mta.errors import InputError, PersonNotFound
from mta.store import Store
from mta.store.state import State
from mta.tools.served import Server, check_served


def state_of(base, bank, seed):
    stack = random_loras(base, 1, rank=1, size=0.6, seed=seed)
    return State(bank.hash, (0, 1, 2), (30.0, -20.0, 5.0 * seed), "fixed", "", f"work{seed}", 0, stack)


@pytest.fixture(scope="module")
def world(tiny_bank_folder, tmp_path_factory):
    base = endless(base_of())
    bank, folder = Bank.open(tiny_bank_folder, base), tmp_path_factory.mktemp("checked")
    with served(base, bank, folder) as here:
        for seed, id in enumerate(("ann", "bob")):
            here.service.store.save(id, state_of(base, bank, seed))
        here.bank = bank
        here.base = base.twin()
        yield here


def server_of(world, key="admin", **how):
    return Server(world.url, world.secrets[key], **how)


def test_a_server_of_the_same_models_agrees(world):
    personal = personalizer(world.base, world.bank, world.service.store)
    found = check_served(server_of(world), personal, ["ann", "bob"])
    assert [one.name for one in found] == ["task", "person:ann", "person:bob"]
    assert {one.verdict for one in found} == {"ok"}
    assert all("differ by 0.00" in one.found for one in found)


def test_a_server_on_this_machine_is_not_asked_through_a_proxy(world, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    personal = personalizer(world.base, world.bank, world.service.store)
    task, people = check_served(server_of(world), personal, [])
    assert (task.verdict, people.name, people.verdict) == ("ok", "people", "warning")
    assert (people.found, "--person ann" in people.hint) == ("no person's model was compared", True)


def test_a_person_with_another_state_here_is_a_problem(world, tmp_path):
    store = Store(tmp_path / "people")
    for seed, id in ((7, "ann"), (1, "bob")):
        store.save(id, state_of(world.base, world.bank, seed))
    ann, bob = check_served(server_of(world, task=""), personalizer(world.base, world.bank, store), ["ann", "bob"])
    assert (ann.verdict, bob.verdict) == ("problem", "ok")
    assert "same base, bank, store" in ann.hint


def test_what_the_server_refuses_is_a_problem_with_its_message(world, tmp_path):
    personal = personalizer(world.base, world.bank, world.service.store)
    (found,) = check_served(server_of(world, task="", person="people/{}"), personal, ["ann"])
    assert found.verdict == "problem"
    assert "answered 404" in found.found
    assert "the model 'people/ann' does not exist" in found.found
    found = check_served(Server(world.url, "wrong"), personal, [])[0]
    assert "answered 401" in found.found


def test_a_server_that_does_not_answer_or_is_another_is_a_problem(world):
    personal = personalizer(world.base, world.bank, world.service.store)
    (found,) = check_served(Server("http://127.0.0.1:9"), personal, ["ann"])
    assert "does not answer" in found.found
    with other_server({"choices": []}) as url:
        assert "not the format" in check_served(Server(url), personal, [])[0].found


def test_log_probabilities_that_are_not_numbers_are_a_problem(world):
    token = {"token": "token_id:40", "logprob": float("nan")}
    with other_server({"choices": [{"logprobs": {"content": [token]}}]}) as url:
        found = check_served(Server(url), personalizer(world.base, world.bank, world.service.store), [])[0]
    assert (found.verdict, "differ by nan" in found.found) == ("problem", True)


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (Server("http://localhost:80a"), "cannot be used"),
        (Server("http://127.0.0.1:9", key="schlüssel€"), "cannot be used"),
        (Server("http://127.0.0.1:9", task=""), "no model to compare"),
    ],
)
def test_an_address_or_a_key_that_cannot_be_used_is_an_error(world, server, message):
    with pytest.raises(InputError, match=message):
        check_served(server, personalizer(world.base, world.bank, world.service.store), [])


def test_a_server_that_gives_people_the_pooled_model_is_a_problem(world):
    personal = personalizer(world.base, world.bank, world.service.store)
    personal.store.save("task", personal.store.load("ann"))  # the server answers "task" with the pooled model
    (found,) = check_served(server_of(world, task="", person="{}"), personal, ["task"])
    assert found.verdict == "problem"
    assert "from the pooled model's" in found.found


def test_a_person_without_a_state_here_is_an_error(world):
    personal = personalizer(world.base, world.bank, world.service.store)
    with pytest.raises(PersonNotFound):
        check_served(server_of(world), personal, ["zoe"])


@contextmanager
def other_server(body):
    """A server that answers everything with one JSON value."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
