"""External faults: a dead engine, and clients that do not read."""

import json
import socket

import httpx2
import pytest
from served import served, until
from tiny import base_of, endless, random_loras

from mta.bank.bank import Bank
from mta.store.state import State


@pytest.fixture
def here(tiny_bank_folder, tmp_path):
    """A server with one person."""
    base = endless(base_of())
    bank = Bank.open(tiny_bank_folder, base)
    with served(base, bank, tmp_path) as running:
        stack = random_loras(base, 1, rank=1, seed=0)
        state = State(bank.hash, (0, 1, 2), (1.0, -2.0, 0.0), "fixed", "", "work", 0, stack)
        running.service.store.save("ann", state)
        running.base = base
        yield running


def asked(here, **how):
    body = {"model": "person:ann", "prompt": "Film 7", "max_tokens": 8} | how
    with here.http("admin") as http:
        return http.post("/v1/completions", json=body)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_unhealthy_and_running_requests_get_an_error(here):
    def broken():
        raise MemoryError("no more")

    assert asked(here).status_code == 200
    assert httpx2.get(f"{here.url}/healthz", timeout=60).status_code == 200
    here.service.engine.scheduler.step = broken
    found = [asked(here), asked(here)]
    assert [answer.status_code for answer in found] == [503, 503]
    assert all(answer.json()["error"]["code"] == "engine_gone" for answer in found)
    assert "Retry-After" in found[0].headers
    for path in ("healthz", "readyz"):
        assert httpx2.get(f"{here.url}/{path}", timeout=60).status_code == 503


def test_a_client_that_does_not_read_does_not_block_others(here):
    body = json.dumps({"model": "person:ann", "prompt": "Film 7", "max_tokens": 200, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {here.secrets['admin']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    address = ("127.0.0.1", int(here.url.rpartition(":")[2]))
    slow = [socket.create_connection(address) for _ in range(6)]  # more than there are slots
    halves = [socket.create_connection(address) for _ in range(6)]
    for connection in slow:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.sendall(head.encode() + body)
    for connection in halves:  # whose requests never end
        connection.sendall(head.encode() + body[:5])
    assert asked(here).status_code == 200
    for connection in (*slow, *halves):
        connection.close()
    until(lambda: not here.service.engine.facts()["running"][0], seconds=120)
    assert asked(here).status_code == 200
