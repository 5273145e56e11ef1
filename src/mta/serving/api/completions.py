"""``/v1/models``, ``/v1/chat/completions``, and ``/v1/completions``, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from mta.errors import MtaError
from mta.personalize.adapters import BASE, TASK, Nobody
from mta.serving.api.auth import Key
from mta.serving.api.schemas import ChatRequest, CompletionRequest, Request, Shape, usage_of
from mta.serving.api.service import Caller, Service, error_of
from mta.serving.api.streaming import Part, Whole, answers, ask_of
from mta.serving.engine import Ask


def add_completions(app: FastAPI, service: Service) -> None:
    """Add the routes that OpenAI clients use."""

    @app.get("/v1/models")
    async def models(key: Caller) -> dict[str, Any]:
        """List the base and the pooled model; a person key also sees its own model."""
        has_model = key.rights == "person" and await run_in_threadpool(service.store.latest, key.of) is not None
        names = [service.base.name, "task", *([f"person:{quote(key.of, safe='')}"] if has_model else [])]
        rows = [{"id": name, "object": "model", "created": 0, "owned_by": "mta"} for name in names]
        return {"object": "list", "data": rows}

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, key: Caller, http: HttpRequest) -> Response:
        """Generate the next turn of a conversation."""
        return await _until_disconnect(http, _respond(service, request, key))

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, key: Caller, http: HttpRequest) -> Response:
        """Continue a text."""
        return await _until_disconnect(http, _respond(service, request, key))


async def _until_disconnect(http: HttpRequest, work: Coroutine[Any, Any, Response]) -> Response:
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


async def _respond(service: Service, request: Request, key: Key) -> Response:
    who = await service.who(request.model, key, request.fallback)
    usual = service.base.prompts.answer_tokens(service.task)
    ask = ask_of(request, who, service.base, key.name, service.length, service.limits.max_tokens, usual)
    kind = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
    names = {TASK: "task", BASE: service.base.name}  # a fallback answer names the model that answered
    model = names[who] if isinstance(who, Nobody) else request.model
    shape = Shape(request, model, f"{kind}-{uuid.uuid4().hex}", service.base.tokenizer)
    parts = _measured(service, ask, request, key)
    if request.stream:
        first = await anext(parts)  # a refusal needs a status code, so it must come before the stream starts
        return StreamingResponse(_events(shape, ask, request, first, parts), media_type="text/event-stream")
    complete = [Whole() for _ in range(request.n)]
    async for part in parts:
        complete[part.index].add(part)
    choices = [shape.choice(n, one.text, one.tokens, one.finish) for n, one in enumerate(complete)]
    tokens = sum(len(one.tokens) for one in complete)
    return JSONResponse(shape.whole(choices, usage_of(len(ask.prompt), tokens, complete[0].cached)))


async def _events(
    shape: Shape, ask: Ask, request: Request, first: Part, parts: AsyncIterator[Part]
) -> AsyncIterator[str]:
    """Yield server-sent events in OpenAI's format."""
    started: set[int] = set()
    tokens = cached = 0
    try:
        async for part in _after(first, parts):
            tokens, cached = tokens + len(part.tokens), part.cached
            piece = shape.delta(part.index, part.text, part.tokens, None, part.index not in started)
            started.add(part.index)
            yield _event(shape.part([piece]))
            if part.finish:
                yield _event(shape.part([shape.delta(part.index, "", (), part.finish)]))
        if request.usage_in_stream:
            yield _event(shape.part([], usage_of(len(ask.prompt), tokens, cached)))
    except MtaError as error:  # the status is sent already
        yield _event(error_of(error)[1])
    yield "data: [DONE]\n\n"


async def _after(first: Part, rest: AsyncIterator[Part]) -> AsyncIterator[Part]:
    yield first
    async for part in rest:
        yield part


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _measured(service: Service, ask: Ask, request: Request, key: Key) -> AsyncIterator[Part]:
    """Yield the pieces of all answers, and record metrics."""
    count, start, last = service.metrics, time.monotonic(), dict[int, float]()
    status, kind = "cancelled", "chat" if isinstance(request, ChatRequest) else "completion"
    try:
        with service.held(key, request.n), count.open.track_inprogress():
            async for part in answers(service.engine, ask, service.base, request):
                now = time.monotonic()
                if part.index not in last:
                    count.first_token.observe(now - start)
                    count.prompt_tokens.inc(len(ask.prompt))
                elif part.tokens:
                    count.token_gap.observe((now - last[part.index]) / len(part.tokens))
                last[part.index] = now
                count.cached_tokens.inc(part.cached if part.finish else 0)
                count.answer_tokens.inc(len(part.tokens))
                yield part
        status = "ok"
        count.answer.observe(time.monotonic() - start)
    except MtaError as error:
        status = str(error_of(error)[0])
        raise
    finally:
        count.requests.labels(kind, status).inc()
