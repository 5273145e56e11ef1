"""What the gateway sends to vLLM and reads from vLLM; fixed responses stand in for the server."""

import asyncio
import json

import httpx2

from mta.serving.api.completions import _event
from mta.serving.engine import Version
from mta.serving.model_names import wire_name
from mta.serving.vllm.engine import _read
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


def test_dropping_a_version_unloads_it_and_leaves_the_persons_newer_version(tmp_path):
    old, new = Version("ann", 1, seal="a" * 16), Version("ann", 2, seal="b" * 16)
    names, unloaded = [wire_name(who) for who in (old, new)], []

    def answer(request):
        if request.method == "GET":
            return httpx2.Response(200, json={"data": [{"id": name} for name in names]})
        unloaded.append(json.loads(request.content)["lora_name"])
        return httpx2.Response(200)

    async def go():
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(answer), base_url="http://vllm") as client:
            await AdapterRegistry(client, tmp_path, 4).drop({old}.__contains__)

    asyncio.run(go())
    assert unloaded == names[:1]
