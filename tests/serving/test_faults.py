"""External faults: a dead engine, clients that do not read, a replaced bank, and many people."""

import asyncio
import json
import shutil
import socket
import time

import httpx2
import pytest
from conftest import TINY_RUN, HashEncoder, people_of
from served import served
from tiny import base_of, endless, random_loras

from mta.bank.bank import Bank
from mta.bank.build import build_bank
from mta.bank.context import Build
from mta.serving.embedded.engine import EmbeddedEngine
from mta.serving.engine import EngineRequest, Version, wire_name
from mta.serving.vllm.adapters import AdapterFolders
from mta.store import Store
from mta.store.state import State


def state_of(base, bank, n):
    """A state that differs from all others."""
    stack = random_loras(base, 1, rank=1, seed=n)
    return State(bank.hash, (0, 1, 2), (1.0, -2.0, float(n % 7)), "fixed", "", f"work{n}", 0, stack)


@pytest.fixture
def here(tiny_bank_folder, tmp_path):
    """A server with one person."""
    base = endless(base_of())
    bank = Bank.open(tiny_bank_folder, base)
    with served(base, bank, tmp_path) as running:
        running.service.store.save("ann", state_of(base, bank, 0))
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
    until = time.monotonic() + 120
    while here.service.engine.facts()["running"][0] and time.monotonic() < until:
        time.sleep(0.05)
    assert here.service.engine.facts()["running"][0] == 0
    assert asked(here).status_code == 200


def test_a_bank_replaced_on_disk_changes_no_answer(tiny_bank_folder, tmp_path, task, cache):
    """Opened files stay open; an adapter for vLLM is built from the bank of the person's state, or not at all."""
    base = endless(base_of())
    shutil.copytree(tiny_bank_folder, tmp_path / "bank")
    bank = Bank.open(tmp_path / "bank", base)
    with served(base, bank, tmp_path) as here:
        store = here.service.store
        store.save("ann", state_of(base, bank, 0))
        before = asked(here, temperature=0).json()["choices"]
        shutil.rmtree(tmp_path / "bank")
        people = people_of(4, prefix="t", seed=5), people_of(12, prefix="c", seed=5)
        build_bank(Build(base_of(), task, HashEncoder(), *people, TINY_RUN, tmp_path / "bank"))
        assert asked(here, temperature=0).json()["choices"] == before
        (tmp_path / "adapters").mkdir()
        made = AdapterFolders(tmp_path / "bank", str(tmp_path / "people"), tmp_path / "adapters", 16)
        assert made.path(wire_name(Version("ann", 1, seal=store.seal("ann", 1)))) is None
        assert list(made.folder.iterdir()) == []
    other = Bank.open(tmp_path / "bank", base)
    (tmp_path / "again").mkdir()
    with served(base, other, tmp_path / "again", store=Store(tmp_path / "people")) as here:
        assert asked(here).json()["error"]["code"] == "other_bank"


def test_the_adapter_cache_is_bounded(tiny, tmp_path):
    base, bank = tiny
    store = Store(tmp_path / "people")

    async def go():
        engine = EmbeddedEngine(base, bank, store, slots=8, length=32, activated=16)
        for n in range(40):
            number = store.save(str(n), state_of(base, bank, n))
            who = Version(str(n), number, seal=store.seal(str(n), number))
            pieces = [piece async for piece in engine.answer(EngineRequest((40, 50, 60), who, max_tokens=2))]
            assert pieces[-1].finish
        held = len(engine.activated)
        await engine.close()
        return held

    assert asyncio.run(go()) == 16
