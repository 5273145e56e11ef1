"""``/v1/models``, ``/v1/chat/completions``, and ``/v1/completions``, whole or streamed.

Half characters and stop texts are never sent.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from mta.errors import DataError, MtaError
from mta.personalize.adapters import BASE, TASK
from mta.serving.api.auth import Key
from mta.serving.api.errors import error_of
from mta.serving.api.schemas import AnswerText, ChatRequest, CompletionRequest, Request, ResponseFormatter, usage_of
from mta.serving.api.service import Caller, Gateway, Service
from mta.serving.engine import TOO_LONG, Ask, Engine, Finish, Refused, ServedModel, Token
from mta.serving.model_names import person_name

_LETTERS = 32  # upper bound of characters per token: longer prompts are refused without tokenizing
_HALF = "\N{REPLACEMENT CHARACTER}"
_BYTES = 4  # of the longest character: a character incomplete after as many tokens stays incomplete
router = APIRouter()


@router.get("/v1/models")
async def models(service: Gateway, key: Caller) -> dict[str, Any]:
    """List the base and the pooled model; a person key also sees its own model."""
    has_model = key.rights == "person" and await run_in_threadpool(service.store.latest, key.of) is not None
    names = [service.base.name, TASK.value, *([person_name(key.of)] if has_model else [])]
    return {"object": "list", "data": [_model(name) for name in names]}


@router.get("/v1/models/{name:path}")
async def model(service: Gateway, name: str, key: Caller) -> dict[str, Any]:
    """Return a model that the key may use: the base, the pooled model, or a person's."""
    await service.who(name, key)
    return _model(name)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "mta"}


@router.post("/v1/chat/completions")
async def chat(service: Gateway, request: ChatRequest, key: Caller, http: HttpRequest) -> Response:
    """Generate the next turn of a conversation."""
    return await until_disconnect(http, _respond(service, "chat", request, key))


@router.post("/v1/completions")
async def completions(service: Gateway, request: CompletionRequest, key: Caller, http: HttpRequest) -> Response:
    """Continue a text."""
    return await until_disconnect(http, _respond(service, "completion", request, key))


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


async def _respond(service: Service, kind: str, request: Request, key: Key) -> Response:
    return await service.answered(kind, request, key, partial(_answer, service, kind, request, key))


async def _answer(service: Service, kind: str, request: Request, key: Key, who: ServedModel) -> Response:
    with service.refusals(kind):
        ask = await run_in_threadpool(_ask, service, request, who, key)  # long prompts take long to tokenize
    formatter = ResponseFormatter(request, name_of(who, service, request.model), service.base.tokenizer)
    parts = _measured(service, kind, ask, request, key)
    if request.stream:
        first = await anext(parts)  # a refusal needs a status code, so it must come before the stream starts
        return StreamingResponse(_events(formatter, ask, request, first, parts), media_type="text/event-stream")
    complete: list[list[AnswerText]] = [[] for _ in range(request.n)]
    async for part in parts:
        complete[part.index].append(part)
    tokens = sum(len(part.tokens) for answer in complete for part in answer)
    usage = usage_of(len(ask.prompt), tokens, complete[0][-1].cached)
    return JSONResponse(formatter.body([formatter.choice(answer) for answer in complete], usage))


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


def _ask(service: Service, request: Request, who: ServedModel, key: Key) -> Ask:
    """Tokenize a request. Raises Refused.

    Without max_tokens an answer has at most the task's number of tokens; an answer of the base, which has no task, may
    fill the remaining length.
    """
    length, limit, prompts = service.length, service.limits.max_tokens, service.base.prompts
    if isinstance(request, ChatRequest):
        turns = [{"role": m.role.replace("developer", "system"), "content": m.text} for m in request.messages]
        letters, most = sum(len(turn["content"]) for turn in turns), request.max_completion_tokens or request.max_tokens
        top = (request.top_logprobs or 0) if request.logprobs else None
    else:
        letters, most, top = len(request.prompt), request.max_tokens or 16, request.logprobs  # 16 is OpenAI's default
    refuse_long(letters, length)
    if (most or 0) > limit:
        raise Refused(
            f"max_tokens is {most}; an answer may have at most {limit} tokens", hint=f"Send max_tokens: {limit}"
        )
    prompt = chat_tokens(service, turns) if isinstance(request, ChatRequest) else prompts.text(request.prompt)
    usual = limit if who is BASE else prompts.answer_tokens(service.task)
    return Ask(
        prompt,
        who,
        max_tokens=most or max(min(length - len(prompt), limit, usual), 1),
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        top_logprobs=top,
        asker=key.name,
    )


async def _events(
    formatter: ResponseFormatter, ask: Ask, request: Request, first: AnswerText, parts: AsyncIterator[AnswerText]
) -> AsyncIterator[str]:
    """Yield server-sent events in OpenAI's format."""
    started: set[int] = set()
    tokens = cached = 0
    try:
        async for part in _after(first, parts):
            tokens, cached = tokens + len(part.tokens), part.cached
            for event in formatter.events(part, first=part.index not in started):
                yield _event(event)
            started.add(part.index)
        if request.stream_options and request.stream_options.include_usage:
            yield _event(formatter.body([], usage_of(len(ask.prompt), tokens, cached)))
    except MtaError as error:  # the status is sent already
        yield _event(error_of(error)[1])
    yield "data: [DONE]\n\n"


async def _after(first: AnswerText, rest: AsyncIterator[AnswerText]) -> AsyncIterator[AnswerText]:
    yield first
    async for part in rest:
        yield part


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"  # ASCII: some clients split lines at U+2028, too


async def _measured(service: Service, kind: str, ask: Ask, request: Request, key: Key) -> AsyncIterator[AnswerText]:
    """Yield the pieces of all answers, and record metrics."""
    count, start, last = service.metrics, time.monotonic(), dict[int, float]()
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or ()
    with service.counted(kind, key, request.n, falls_back=request.fallback is not None):
        async for part in answers(service.engine, ask, service.base.tokenizer, request.n, stops):
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


class Text:
    """Detokenizes one answer piece by piece.

    Text is held back while it may be the beginning of a stop text, or part of a character.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.stopped = False
        self._tokens: list[int] = []  # the new tokens, and those of the character before them
        self._new = 0  # number of new tokens: their text is not in ``_pending``
        self._known = ""  # the part of their text that ``_pending`` has or had
        self._pending = ""  # text that is not returned yet

    def add(self, token: int) -> str:
        """Add one token; return the text that is final now."""
        self._tokens.append(token)
        self._new += 1
        text = self._decoded()
        half = text.endswith(_HALF)
        if half and self._new < _BYTES:
            return ""
        self._pending += text[len(self._known) :]
        # The next tokens are decoded behind this one: some tokenizers write a word differently at the start of a text.
        # All tokens of a character stay together: some tokenizers decode neighboring bytes only as a whole.
        self._tokens = [token] if half else self._tokens[-self._new :]
        self._known, self._new = self._decoded(), 0
        return self._give(held=max((len(stop) - 1 for stop in self.stops), default=0))

    def end(self) -> str:
        """Return the remaining text at the end of the answer."""
        self._pending += self._decoded()[len(self._known) :]
        return self._give(held=0)

    def _give(self, held: int) -> str:
        places = [(self._pending.find(stop), len(stop)) for stop in self.stops]
        found = [(at + length, at) for at, length in places if at >= 0]  # the stop text completed first ends the answer
        self.stopped = bool(found)
        until = min(found)[1] if found else max(len(self._pending) - held, 0)
        piece, self._pending = self._pending[:until], self._pending[until:]
        return piece

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self._tokens, skip_special_tokens=True))


async def answers(
    engine: Engine, ask: Ask, tokenizer: Any, count: int, stops: Sequence[str]
) -> AsyncIterator[AnswerText]:
    """Stream the parts of ``count`` answers as they come, each until its first stop text.

    Closing the iterator cancels all answers.
    """
    parts: asyncio.Queue[AnswerText | BaseException] = asyncio.Queue()

    async def answer(index: int) -> None:
        seeded = ask if ask.seed is None else replace(ask, seed=ask.seed + index)
        text = Text(tokenizer, stops)
        held: list[Token] = []  # tokens with text that is still held back
        try:
            async with aclosing(engine.answer(seeded)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    shown = text.add(piece.token.id) if piece.token else text.end()
                    held += [piece.token] if piece.token else []
                    finish: Finish | None = "stop" if text.stopped else piece.finish
                    if shown or finish:
                        parts.put_nowait(AnswerText(index, shown, tuple(held), finish, piece.cached))
                        held = []
                    if finish:
                        return
        except BaseException as error:
            parts.put_nowait(error)
            raise

    tasks = [asyncio.create_task(answer(index)) for index in range(count)]
    try:
        running = count
        while running:
            part = await parts.get()
            if isinstance(part, BaseException):
                raise part
            yield part
            running -= part.finish is not None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
