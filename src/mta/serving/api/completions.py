"""``/v1/models``, ``/v1/chat/completions``, and ``/v1/completions``, whole or streamed."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from mta.errors import MtaError
from mta.personalize.adapters import BASE, TASK
from mta.serving.api.auth import Key
from mta.serving.api.errors import error_of
from mta.serving.api.schemas import AnswerText, ChatRequest, CompletionRequest, Request, ResponseFormatter, usage_of
from mta.serving.api.service import Caller, Earlier, Gateway, Service
from mta.serving.api.streaming import stream_answer, until_disconnect
from mta.serving.engine import EngineRequest, Refused, ServedModel, person_name

router = APIRouter()
_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass events on at once


@router.get("/v1/models")
async def models(service: Gateway, key: Caller) -> dict[str, Any]:
    """List the base and the pooled model; a person key also sees its own model."""
    has_model = key.rights == "person" and await run_in_threadpool(service.store.latest, key.scope) is not None
    names = [service.base.name, TASK.value, *([person_name(key.scope)] if has_model else [])]
    data = [{"id": name, "object": "model", "created": 0, "owned_by": "mta"} for name in names]
    return {"object": "list", "data": data}


@router.post("/v1/chat/completions")
async def chat(service: Gateway, request: ChatRequest, key: Caller, http: HttpRequest) -> Response:
    """Generate the next turn of a conversation."""
    return await until_disconnect(http, _respond(service, "chat", request, key))


@router.post("/v1/completions")
async def completions(service: Gateway, request: CompletionRequest, key: Caller, http: HttpRequest) -> Response:
    """Continue a text."""
    return await until_disconnect(http, _respond(service, "completion", request, key))


async def _respond(service: Service, kind: str, request: Request, key: Key) -> Response:
    return await service.with_fallback(kind, request, key, partial(_answer, service, kind, request, key))


async def _answer(service: Service, kind: str, request: Request, key: Key, who: ServedModel) -> Response:
    earlier = Earlier((), key.name)
    if isinstance(request, ChatRequest):
        earlier = await service.earlier(request, key)
    asked = await service.in_turn(key, _tokenized, service, request, who, earlier)  # long prompts take long
    await earlier.check()
    formatter = ResponseFormatter(request, service.name_of(who, request.model), service.base.tokenizer)
    parts = _counted_parts(service, kind, asked, request, key)
    if request.stream:
        first = await anext(parts)  # a refusal needs a status code, so it must come before the stream starts
        events = _events(formatter, asked, request, first, parts, partial(service.count_error, kind))
        return StreamingResponse(events, media_type="text/event-stream", headers=_UNBUFFERED)
    answer = [part async for part in parts]
    usage = usage_of(len(asked.prompt), sum(len(part.tokens) for part in answer), answer[-1].cached)
    choice = await service.apart_from_store(formatter.choice, answer)
    return JSONResponse(formatter.body([choice], usage))


def _tokenized(service: Service, request: Request, who: ServedModel, earlier: Earlier) -> EngineRequest:
    """Tokenize a request; the first turn of a user comes behind ``earlier`` items. Raises Refused.

    Without max_tokens an answer has at most the task's number of tokens; an answer of the base, which has no task, may
    fill the remaining length.
    """
    length, limit, prompts = service.engine.length, service.limits.max_tokens, service.base.prompts
    if isinstance(request, ChatRequest):
        turns = [{"role": m.role.replace("developer", "system"), "content": m.text} for m in request.messages]
        most = request.max_completion_tokens or request.max_tokens
        room = length - (most or prompts.answer_tokens(service.task))
        if earlier.items and (first := next((turn for turn in turns if turn["role"] == "user"), None)):

            def fits(text: str) -> bool:
                longer = [turn | {"content": text} if turn is first else turn for turn in turns]
                return len(service.chat_tokens(longer)) <= room

            first["content"] = service.behind(earlier.items, first["content"], fits)
        prompt = service.chat_tokens(turns)
        top = (request.top_logprobs or 0) if request.logprobs else None
    else:
        prompt, most, top = prompts.text(request.prompt), request.max_tokens or 16, request.logprobs  # OpenAI's 16
    if (most or 0) > limit:
        raise Refused(
            f"max_tokens is {most}; an answer may have at most {limit} tokens", hint=f"Send max_tokens: {limit}"
        )
    usual = limit if who is BASE else prompts.answer_tokens(service.task)
    return EngineRequest(
        prompt,
        who,
        max_tokens=most or max(min(length - len(prompt), limit, usual), 1),
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        top_logprobs=top,
        asker=earlier.asker,
    )


async def _events(
    formatter: ResponseFormatter,
    asked: EngineRequest,
    request: Request,
    first: AnswerText,
    parts: AsyncIterator[AnswerText],
    on_error: Callable[[MtaError], None],
) -> AsyncIterator[str]:
    """Yield server-sent events in OpenAI's format."""
    tokens = cached = 0
    try:
        part: AnswerText | None = first
        while part:
            tokens, cached = tokens + len(part.tokens), part.cached
            for event in formatter.events(part, first=part is first):
                yield _event(event)
            part = await anext(parts, None)
        if (request.stream_options or {}).get("include_usage"):
            yield _event(formatter.body([], usage_of(len(asked.prompt), tokens, cached)))
    except MtaError as error:  # the status is sent already
        on_error(error)
        yield _event(error_of(error)[1])
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"  # ASCII: some clients split lines at U+2028, too


async def _counted_parts(
    service: Service, kind: str, asked: EngineRequest, request: Request, key: Key
) -> AsyncIterator[AnswerText]:
    """Yield the pieces of an answer, and record metrics."""
    metrics, start, last = service.metrics, time.monotonic(), 0.0
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or ()
    before = asked.prompt[-1:] if isinstance(request, CompletionRequest) else ()  # a turn begins a text
    answer = stream_answer(service.engine, asked, service.base.tokenizer, stops, before)
    with service.counted(kind, key):
        async with aclosing(answer):
            async for part in answer:
                now = time.monotonic()
                if not last:
                    metrics.first_token.observe(now - start)
                    metrics.prompt_tokens.inc(len(asked.prompt))
                elif part.tokens:
                    metrics.token_gap.observe((now - last) / len(part.tokens))
                last = now
                metrics.answer_tokens.inc(len(part.tokens))
                yield part
