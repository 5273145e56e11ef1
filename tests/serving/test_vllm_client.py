"""What the gateway sends to vLLM and reads from vLLM; fixed responses stand in for the server."""

import asyncio
import json
from contextlib import asynccontextmanager
from types import SimpleNamespace

import httpx2
import pytest

from mta.serving.api.completions import _event
from mta.serving.engine import EngineGone, EngineRequest, ModelRemoved, Version, wire_name
from mta.serving.vllm.engine import VllmEngine, _read
from mta.serving.vllm.registry import AdapterRegistry

ODD = "a\N{NEXT LINE}b\N{LINE SEPARATOR}c\N{PARAGRAPH SEPARATOR}d\x0b"


def test_an_event_with_odd_line_separators_in_its_text_is_read_whole():
    events = [
        {"choices": [{"text": ODD, "token_ids": [7], "finish_reason": None}]},
        {"choices": [{"text": "é", "token_ids": [8], "finish_reason": "length"}]},
    ]
    lines = [f"data: {json.dumps(event, ensure_ascii=False)}\r\n\r\n" for event in events]
    data = "".join([*lines, "data: [DONE]\n\n"]).encode()

    async def sent():  # chunks end inside of characters and lines
        for at in range(0, len(data), 7):
            yield data[at : at + 7]

    async def go():
        return [piece async for piece in _read(httpx2.Response(200, content=sent()), (), 0)]

    *pieces, end = asyncio.run(go())
    assert [piece.token.id for piece in pieces] == [7, 8]
    assert end.finish == "length"


def test_an_event_of_the_gateway_is_one_line_for_every_client():
    event = _event({"text": ODD})
    assert event.endswith("\n\n")
    assert len(event.splitlines()) == 2
    assert json.loads(event.removeprefix("data: ")) == {"text": ODD}


PERSON = Version("ann", 1, seal="a" * 16)


class Server:
    """Stands in for vLLM: unloads adapters with the ``statuses`` in turn, then with 200."""

    def __init__(self, *statuses):
        self.statuses, self.unloaded = list(statuses), []
        self.unloading, self.may_unload = asyncio.Event(), asyncio.Event()  # a request has come; it is answered
        self.may_unload.set()

    async def answer(self, request):
        self.unloading.set()
        await self.may_unload.wait()
        status = self.statuses.pop(0) if self.statuses else 200
        if status == 200:
            self.unloaded.append(json.loads(request.content)["lora_name"])
        return httpx2.Response(status)

    @asynccontextmanager
    async def registry(self, folder, count=4):
        transport = httpx2.MockTransport(self.answer)
        async with httpx2.AsyncClient(transport=transport, base_url="http://vllm") as client:
            yield AdapterRegistry(client, SimpleNamespace(folder=folder, up=True), count)


async def used(registry, who, until=None, begun=None):
    """Use an adapter until an event."""
    async with registry.held(who):
        if begun:
            begun.set()
        if until:
            await until.wait()


@pytest.mark.anyio
async def test_dropping_a_version_unloads_it_and_leaves_the_persons_newer_version(tmp_path):
    server = Server()
    async with server.registry(tmp_path) as registry:
        for version in PERSON, Version("ann", 2, seal="b" * 16):
            await used(registry, version)
        await registry.drop({PERSON}.__contains__, list)
    assert server.unloaded == [wire_name(PERSON)]


@pytest.mark.anyio
async def test_an_adapter_that_was_not_unloaded_answers_on(tmp_path, caplog):
    """Nobody who asks is told to forget a person again, and the log says what failed."""
    async with Server(500, 500).registry(tmp_path, count=0) as registry:  # idle ones are unloaded at once
        for _ in range(2):
            await used(registry, PERSON)
        await registry.unloads_ended()
        assert len(registry) == 1
    assert "an idle adapter was not unloaded: EngineGone" in caplog.text


@pytest.mark.anyio
async def test_a_dropped_adapter_that_was_not_unloaded_answers_nobody(tmp_path):
    server = Server(500)
    server.may_unload.clear()
    async with server.registry(tmp_path) as registry:
        await used(registry, PERSON)
        dropping = asyncio.create_task(registry.drop({PERSON}.__contains__, list))
        await server.unloading.wait()
        using = asyncio.create_task(used(registry, PERSON))
        await asyncio.sleep(0)
        server.may_unload.set()
        ended = await asyncio.gather(dropping, using, return_exceptions=True)
    assert [type(error) for error in ended] == [EngineGone, ModelRemoved]


@pytest.mark.anyio
async def test_a_dropped_adapter_that_was_not_unloaded_is_unloaded_later_and_its_person_can_come_back(tmp_path):
    server = Server(500)
    async with server.registry(tmp_path) as registry:
        await used(registry, PERSON)
        with pytest.raises(EngineGone):
            await registry.drop({PERSON}.__contains__, list)
        registry.versions()  # as every sweep asks
        await registry.unloads_ended()
        await used(registry, PERSON)
    assert server.unloaded == [wire_name(PERSON)]


@pytest.mark.anyio
async def test_an_adapter_that_is_being_unloaded_is_loaded_again_for_a_request(tmp_path):
    server = Server()
    server.may_unload.clear()
    async with server.registry(tmp_path, count=0) as registry:
        await used(registry, PERSON)
        await server.unloading.wait()
        begun, until = asyncio.Event(), asyncio.Event()
        using = asyncio.create_task(used(registry, PERSON, until, begun))
        await asyncio.sleep(0)
        assert not begun.is_set()
        server.may_unload.set()
        await asyncio.wait_for(begun.wait(), 5)
        assert registry._loaded[wire_name(PERSON)].answers == 1
        until.set()
        await using
        await registry.unloads_ended()
    assert server.unloaded == [wire_name(PERSON)] * 2


@pytest.mark.anyio
async def test_a_dropped_adapter_is_given_to_nobody_while_another_answer_ends(tmp_path):
    begun, may_end = asyncio.Event(), asyncio.Event()
    async with Server().registry(tmp_path) as registry:
        using = asyncio.create_task(used(registry, PERSON, may_end, begun))
        await begun.wait()
        dropping = asyncio.create_task(registry.drop({PERSON}.__contains__, lambda: [] if using.done() else [using]))
        while not registry._loaded[wire_name(PERSON)].dropped:
            await asyncio.sleep(0)
        with pytest.raises(ModelRemoved):
            await asyncio.wait_for(asyncio.create_task(used(registry, PERSON)), 5)
        may_end.set()
        await asyncio.gather(using, dropping)


@pytest.mark.parametrize("seed", [None, 0, -1, -2, 2**63 - 1])
def test_every_seed_is_one_that_vllm_takes(seed):
    """It takes -1 for no seed."""
    engine = SimpleNamespace(stops=frozenset(), _salted=lambda ask: "")
    sent = VllmEngine._body(engine, EngineRequest((1,), Version("ann", 1), 4, seed=seed), "ann")["seed"]
    assert (sent is None) == (seed is None)
    assert sent is None or 0 <= sent < 2**63
