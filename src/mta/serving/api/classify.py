"""``/v1/classify``: the probability of every label of the task, in vLLM's format."""

from __future__ import annotations

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
from mta.serving.api.schemas import ClassifyRequest, usage_of
from mta.serving.api.service import Caller, Earlier, Gateway, Service
from mta.serving.api.streaming import until_disconnect
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
        earlier = await service.earlier(request, key)
        asked = [await service.in_turn(key, _tokenized, service, text, labels, who, earlier) for text in inputs]
        scored = list[AnswerPiece]()
        for start in range(0, len(asked), at_once):  # no answer begins after the person of the items was forgotten
            await earlier.check()
            scored += await together(_scored(service.engine, one) for one in asked[start : start + at_once])
    tokens, cached = sum(len(one.prompt) for one in asked), sum(piece.cached for piece in scored)
    service.metrics.prompt_tokens.inc(tokens)
    data = []
    for index, piece in enumerate(scored):
        probs = torch.tensor(piece.scores, dtype=torch.float64).softmax(0)
        best = labels[int(probs.argmax())]
        data.append({"index": index, "label": best, "probs": probs.tolist(), "num_classes": len(labels)})
    body: dict[str, Any] = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
    body |= {"model": service.name_of(who, request.model), "data": data, "labels": list(labels)}
    return JSONResponse(body | {"usage": usage_of(tokens, 0, cached)})


def _tokenized(service: Service, text: str, labels: Sequence[str], who: ServedModel, earlier: Earlier) -> EngineRequest:
    """Tokenize an input with every label. Raises Refused for a long input before its labels are tokenized."""
    prompts = service.base.prompts
    longest, most = prompts.answer_tokens(service.task), service.engine.length

    def fits(text: str) -> bool:
        return len(service.chat_tokens([{"role": "user", "content": text}])) + longest <= most

    EngineRequest(service.chat_tokens([{"role": "user", "content": text}]), who, max_tokens=1).check(most)
    text = service.behind(earlier.items, text, fits)
    examples = prompts.answered(text, labels)
    targets = tuple(example.target for example in examples)
    asked = EngineRequest(
        examples[0].prompt, who, max_tokens=max(map(len, targets)), asker=earlier.asker, labels=targets
    )
    asked.check(most)
    return asked


async def _scored(engine: Engine, asked: EngineRequest) -> AnswerPiece:
    async with aclosing(engine.answer(asked)) as pieces:  # type: ignore[type-var]
        return [piece async for piece in pieces][-1]
