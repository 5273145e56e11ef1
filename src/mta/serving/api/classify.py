"""``/v1/classify``: the probability of every label of the task, in vLLM's format."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import torch
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from mta.serving.api.auth import Key
from mta.serving.api.requests import chat_tokens, name_of, refuse_long, until_disconnect
from mta.serving.api.schemas import ClassifyRequest, usage_of
from mta.serving.api.service import Caller, Gateway, Service
from mta.serving.engine import AnswerPiece, Engine, EngineRequest, Refused, ServedModel, together

router = APIRouter()


@router.post("/v1/classify")
async def classify(service: Gateway, request: ClassifyRequest, key: Caller, http: HttpRequest) -> Response:
    """Return the probability of every label for each input, a prompt worded as the task's."""
    answer = partial(_answer, service, request, key)
    return await until_disconnect(http, service.with_fallback("classify", request, key, answer))


async def _answer(service: Service, request: ClassifyRequest, key: Key, who: ServedModel) -> Response:
    labels = service.task.labels
    if labels is None:
        raise Refused(
            f"task {service.task.name!r} has no labels; /v1/classify chooses among labels",
            hint="Generate a text instead: POST /v1/chat/completions",
        )
    inputs = [request.input] if isinstance(request.input, str) else request.input
    at_once = min(len(inputs), service.limits.own) if key.share else len(inputs)
    with service.counted("classify", key, at_once):  # first: many inputs tokenize long
        async with service.checking(key):
            asks = [await service.apart_from_store(_ask, service, text, labels, who, key) for text in inputs]
        places = asyncio.Semaphore(at_once)
        found = await together(_piece(service.engine, ask, places) for ask in asks)
    service.metrics.prompt_tokens.inc(sum(len(ask.prompt) for ask in asks))
    service.metrics.cached_tokens.inc(sum(piece.cached for piece in found))
    data = []
    for index, piece in enumerate(found):
        probs = torch.tensor(piece.scores, dtype=torch.float64).softmax(0)
        best = labels[int(probs.argmax())]
        data.append({"index": index, "label": best, "probs": probs.tolist(), "num_classes": len(labels)})
    usage = usage_of(sum(len(ask.prompt) for ask in asks), 0, sum(piece.cached for piece in found))
    body: dict[str, Any] = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
    body |= {"model": name_of(who, service, request.model), "data": data, "labels": list(labels)}
    return JSONResponse(body | {"usage": usage})


def _ask(service: Service, text: str, labels: Sequence[str], who: ServedModel, key: Key) -> EngineRequest:
    """Tokenize an input with every label. Raises Refused, for a long input before its labels are tokenized."""
    prompts = service.base.prompts
    refuse_long(len(text), service.length)
    EngineRequest(chat_tokens(service, [{"role": "user", "content": text}]), who, max_tokens=1).check(service.length)
    examples = prompts.answered(text, labels)
    targets = tuple(example.target for example in examples)
    ask = EngineRequest(examples[0].prompt, who, max_tokens=max(map(len, targets)), asker=key.name, labels=targets)
    ask.check(service.length)
    return ask


async def _piece(engine: Engine, ask: EngineRequest, places: asyncio.Semaphore) -> AnswerPiece:
    async with places, aclosing(engine.answer(ask)) as pieces:  # type: ignore[type-var]
        return [piece async for piece in pieces][-1]
