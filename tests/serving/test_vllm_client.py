"""What the gateway reads from vLLM, without a vLLM: fixed responses stand in for the server's."""

import asyncio
import json

import httpx2

from mta.serving.api.completions import _event
from mta.serving.vllm.engine import _read

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
