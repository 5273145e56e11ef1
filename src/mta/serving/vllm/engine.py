"""The vLLM engine: a vLLM server behind the gateway, with one adapter name per version of a person."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, get_args

import httpx2 as httpx

from mta.bank.bank import Bank
from mta.errors import MtaError
from mta.model.base import BaseModel
from mta.personalize.adapters import BASE, TASK, check_bank
from mta.serving.engine import (
    COLDEST,
    LATER,
    LOST,
    QUEUED,
    AnswerLost,
    AnswerPiece,
    Engine,
    EngineGone,
    EngineRequest,
    Finish,
    Pieces,
    ServedModel,
    Token,
    Version,
    log_failure,
    together,
)
from mta.serving.vllm.adapters import remove_all
from mta.serving.vllm.registry import AdapterRegistry
from mta.serving.vllm.server import VllmServer
from mta.store import Store

_TIMEOUT = httpx.Timeout(30, read=600)  # a queued request may wait long for its first token
_AT_ONCE = 32  # scored tokens; each needs a connection
_PATIENCE = 5.0  # seconds that a stop waits for answers, which the gateway has ended already unless the server hangs
_ID = "token_id:"  # prefix of tokens that vLLM returns as ids


class VllmEngine(Engine):
    """Answers with a vLLM server, which ``close`` stops.

    The server runs at most ``slots`` answers at once, and ``waiting`` more are queued. At most ``activated`` idle
    adapters stay loaded.
    """

    def __init__(
        self,
        server: VllmServer,
        base: BaseModel,
        bank: Bank,
        store: Store,
        *,
        slots: int = 32,
        waiting: int = QUEUED,
        activated: int = 64,
    ) -> None:
        super().__init__(base.prompts.max_tokens, slots + waiting)
        self.server, self.client, self.bank, self.store = server, server.client(), bank, store
        self.stops = frozenset(base.stop_tokens)
        self.adapters = AdapterRegistry(self.client, server, activated)
        self._open: dict[asyncio.Task[None], tuple[EngineRequest, Pieces]] = {}
        self._salt = secrets.token_bytes(32)
        self._forcing = asyncio.Semaphore(_AT_ONCE)

    @property
    def alive(self) -> bool:
        """False once the server has ended: the gateway does not restart it."""
        return self.server.up

    def _begin(self, request: EngineRequest, pieces: Pieces) -> Callable[[], object]:
        task = asyncio.create_task(self._forward(request, pieces))
        self._open[task] = request, pieces
        task.add_done_callback(self._open.pop)
        return task.cancel

    async def forget(self, person: str, askers: Collection[str] = ()) -> None:
        """Forget as every engine does, and delete files that are left of the person's adapters. Raises EngineGone."""
        await super().forget(person, askers)
        remove_all(self.server.folder, person)

    async def _drop(self, matches: Callable[[Version], bool], error: MtaError, askers: Collection[str] = ()) -> None:
        """Unload the adapters, too, and delete their files; vLLM's cache of prompts stays. Raises EngineGone."""

        def end() -> list[asyncio.Task[None]]:
            ending = []
            for task, (request, pieces) in self._open.items():
                if request.asker in askers or (isinstance(request.who, Version) and matches(request.who)):
                    pieces.put_nowait(error)
                    task.cancel()
                    ending.append(task)
            return ending

        await self.adapters.drop(matches, end)

    async def versions(self) -> set[Version]:
        """Return the person versions that vLLM may have loaded."""
        return self.adapters.versions()

    def facts(self) -> dict[str, tuple[float, str]]:
        """Return metrics of answers and adapters."""
        return {
            "running": (len(self._open), "Answers running or waiting in vLLM"),
            "activated": (len(self.adapters), "Adapters that vLLM may have loaded"),
        }

    async def close(self) -> None:
        """Finish running answers, accept no new ones, and stop; a server that hangs is not waited for long."""
        self._closing = True
        if self._open:
            await asyncio.wait([*self._open], timeout=_PATIENCE)
        await asyncio.to_thread(self.server.stop)  # ends the answers that are left
        await asyncio.gather(*self._open, return_exceptions=True)
        await self.adapters.unloads_ended()
        await self.client.aclose()

    async def _forward(self, request: EngineRequest, queue: Pieces) -> None:
        """Put the pieces of an answer, or its error, into the queue."""
        try:
            who = BASE if request.who is TASK and self.bank.task_lora is None else request.who
            async with self.adapters.held(who) as name:
                await (self._score if request.labels else self._stream)(request, name, queue)
        except MtaError as error:
            queue.put_nowait(error)
        except httpx.HTTPError:
            queue.put_nowait(self.server.gone())
        except Exception as error:  # any failure must reach the caller and end only this answer
            log_failure("an answer of vLLM", error)
            queue.put_nowait(AnswerLost(LOST, hint=LATER))

    async def _stream(self, request: EngineRequest, name: str, queue: Pieces) -> None:
        async with self._asked(request, self._body(request, name)) as response:
            async for piece in _read(response, self.stops, request.top_logprobs or 0):
                queue.put_nowait(piece)

    async def _score(self, request: EngineRequest, name: str, queue: Pieces) -> None:
        """Score every label, with one request for each of its tokens that no other label shares.

        Such a request may choose one token only, and vLLM returns the log probability from before this choice. (Its log
        probabilities of prompts fail together with adapters, in vLLM 0.32.)
        """
        steps = sorted({(label[:count], label[count]) for label in request.labels for count in range(len(label))})
        first = await self._forced(request, name, *steps[0])  # so that the others find a cached prompt
        others = await together(self._forced(request, name, *step) for step in steps[1:])
        logprobs = dict(zip(steps, [first, *others]))
        scores = (sum(logprobs[label[:count], label[count]] for count in range(len(label))) for label in request.labels)
        queue.put_nowait(AnswerPiece(finish="stop", scores=tuple(scores)))

    async def _forced(self, request: EngineRequest, name: str, start: tuple[int, ...], token: int) -> float:
        """Return the log probability of a token behind the prompt and the beginning of a label."""
        body = {"model": name, "prompt": [*request.prompt, *start], "max_tokens": 1, "temperature": 0.0, "logprobs": 0}
        body |= {"cache_salt": self._salted(request), "allowed_token_ids": [token], "ignore_eos": True}
        async with self._forcing, self._asked(request, body) as response:
            (choice,) = json.loads(await response.aread())["choices"]
        return float(choice["logprobs"]["token_logprobs"][0])

    @asynccontextmanager
    async def _asked(self, request: EngineRequest, body: dict[str, Any]) -> AsyncIterator[httpx.Response]:
        sent = self.client.build_request("POST", "/v1/completions", json=body, timeout=_TIMEOUT)
        async with aclosing(await _opened(asyncio.create_task(self.client.send(sent, stream=True)))) as response:
            if response.status_code != 200:
                raise await asyncio.to_thread(self._error_of, request.who, response.status_code)
            yield response

    def _salted(self, request: EngineRequest) -> str:
        """Return the caller's salt: vLLM separates cached prefixes by adapter and by salt."""
        return hmac.new(self._salt, request.asker.encode(), hashlib.sha256).hexdigest()

    def _body(self, request: EngineRequest, name: str) -> dict[str, Any]:
        return {
            "model": name,
            "prompt": list(request.prompt),
            "max_tokens": request.max_tokens,
            "stream": True,
            "ignore_eos": True,  # only our stop tokens end an answer
            "stop_token_ids": sorted(self.stops),
            "temperature": request.temperature if request.temperature >= COLDEST else 0.0,
            "top_p": request.top_p,
            "seed": None if request.seed is None else request.seed % 2**63,  # vLLM takes -1 for no seed
            "logprobs": request.top_logprobs,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stream_options": {"include_usage": True},
            "cache_salt": self._salted(request),
        }

    def _error_of(self, who: ServedModel, status: int) -> MtaError:
        """Return the error for a vLLM status; read the state here, because vLLM does not say what is wrong with it."""
        if isinstance(who, Version) and status in (400, 404):
            try:
                check_bank(self.store.load(who.person, who.number), self.bank.hash)
            except MtaError as error:
                return error
            if status == 404:
                hint = "The log of vLLM says why. Ask again later."
                return AnswerLost("vLLM has no adapter of this person", hint=hint)
        return (AnswerLost if status < 500 else EngineGone)(f"vLLM answered {status}, expected 200", hint=LATER)


async def _opened(opening: asyncio.Task[httpx.Response]) -> httpx.Response:
    """Return the response once vLLM starts to answer; when cancelled before, still wait for that.

    Until then vLLM may be loading the adapter, and unloading it meanwhile would leave it half loaded.
    """
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        while not opening.done():  # a second cancellation may arrive
            with suppress(asyncio.CancelledError):
                await asyncio.wait((opening,))
        if not opening.cancelled() and opening.exception() is None:
            await opening.result().aclose()
        raise


async def _read(response: httpx.Response, stops: Collection[int], most: int) -> AsyncIterator[AnswerPiece]:
    """Convert server-sent events to pieces; the last piece has the number of cached prompt tokens.

    Raises EngineGone if the events end too early.
    """
    cached = 0
    finish: Finish | None = None
    async for line in _lines(response):
        if not line.startswith(b"data: ") or line == b"data: [DONE]":
            continue
        event = json.loads(line[6:])
        if "error" in event:
            refused = event["error"].get("code", 500) < 500
            kind, verb = (AnswerLost, "refused") if refused else (EngineGone, "ended")
            raise kind(f"vLLM {verb} the answer", hint=LATER)
        details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens") or cached
        for choice in event["choices"]:
            for token in _tokens(choice, most):
                if token.id not in stops:
                    yield AnswerPiece(token)
            finish = choice.get("finish_reason") or finish
    if finish not in get_args(Finish):
        raise EngineGone("vLLM ended the answer too early", hint=LATER)
    yield AnswerPiece(finish=finish, cached=cached)


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield the lines of a response; httpx's ``aiter_lines`` also splits at U+2028, which JSON may contain."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.rstrip()


def _tokens(choice: dict[str, Any], most: int) -> list[Token]:
    """Return the tokens of a choice, each with at most ``most`` alternatives: vLLM adds the sampled token to them."""
    ids, scores = choice.get("token_ids") or [], choice.get("logprobs")
    if not scores:
        return [Token(id) for id in ids]
    tokens = []
    for id, logprob, alternatives in zip(ids, scores["token_logprobs"], scores["top_logprobs"]):
        top = [(int(name.removeprefix(_ID)), value) for name, value in (alternatives or {}).items()]
        tokens.append(Token(id, logprob, tuple(sorted(top, key=lambda pair: -pair[1])[:most])))
    return tokens
