"""What the routes that ask a model have in common: limits, names, chat templates, and callers who leave."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import Response
from starlette.convertors import PathConvertor, register_url_convertor

from mta.errors import DataError
from mta.personalize.adapters import BASE, TASK
from mta.serving.api.service import Service
from mta.serving.engine import TOO_LONG, Refused, ServedModel


class _Whole(PathConvertor):
    """The rest of a path, or of the part before a known ending. Starlette's ``path`` does not match line breaks."""

    regex = "(?s:.*)"


register_url_convertor("whole", _Whole())
_LETTERS = 32  # upper bound of characters per token: longer prompts are refused without tokenizing


async def until_disconnect(http: HttpRequest, work: Coroutine[Any, Any, Response]) -> Response:
    """Return the response of ``work``; cancel ``work`` when the caller disconnects, so that its slot is freed."""

    async def disconnected() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else Response(status_code=499)
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


def name_of(who: ServedModel, service: Service, requested: str) -> str:
    """Return the name of the model that answers, which is another one after a fallback."""
    names: dict[ServedModel, str] = {TASK: TASK.value, BASE: service.base.name}
    return names.get(who, requested)


def refuse_long(letters: int, length: int) -> None:
    """Raises Refused for a text that cannot fit, without tokenizing it."""
    if letters > length * _LETTERS:
        raise Refused(
            f"the prompt has {letters} characters; prompt and answer may have at most {length} tokens together",
            hint=f"Send at most {length * _LETTERS} characters.",
            code=TOO_LONG,
        )


def chat_tokens(service: Service, turns: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """Return the tokens of a conversation. Raises Refused for messages that the base's chat template rejects."""
    try:
        return service.base.prompts.chat(turns)
    except DataError as error:
        raise Refused(error.message, hint="Send other messages.") from None
