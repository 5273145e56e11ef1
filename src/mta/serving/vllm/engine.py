"""The vLLM engine: a vLLM server behind the gateway, with one adapter name per version of a person."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Collection
from contextlib import aclosing, suppress
from typing import Any

import httpx2 as httpx

from mta.errors import MtaError, OtherBank
from mta.personalize.adapters import BASE, TASK, Nobody
from mta.serving.engine import LATER, LOST, AnswerLost, Ask, EngineGone, Finish, Piece, QueueFull, Token, Version
from mta.serving.sampling import COLDEST
from mta.serving.vllm.registry import AdapterRegistry
from mta.serving.vllm.server import Remote, VllmServer
from mta.store import Store

_TIMEOUT = httpx.Timeout(30, read=600)  # a queued request may wait long for its first token
_ID = "token_id:"  # prefix of tokens that vLLM returns as ids
Pieces = asyncio.Queue[Piece | MtaError]


class VllmEngine:
    """Answers with a vLLM server; ``close`` also stops a server that we started.

    A prompt and its answer have at most ``length`` tokens together; more than ``most`` answers at once are refused.
    At most ``activated`` idle adapters stay loaded. ``pooled`` is whether the bank has a task LoRA; without a task LoRA
    the pooled model is the base.
    """

    def __init__(
        self,
        server: VllmServer | Remote,
        store: Store,
        *,
        bank: str,
        pooled: bool = True,
        length: int,
        stops: Collection[int],
        most: int = 256,
        activated: int = 64,
    ) -> None:
        self.server, self.client, self.store, self.bank, self.pooled = server, server.client(), store, bank, pooled
        self.length, self.stops, self.most = length, frozenset(stops), most
        self.adapters = AdapterRegistry(self.client, server.folder, activated)
        self._salt = secrets.token_bytes(32)
        self._running: dict[asyncio.Task[None], Pieces] = {}
        self._closing = False

    @property
    def ready(self) -> bool:
        """Whether requests would be answered now, as far as the gateway knows."""
        return not self._closing and self.server.up

    @property
    def alive(self) -> bool:
        """False once a server that this gateway started has ended: the gateway does not restart it."""
        return self.server.up

    async def answer(self, ask: Ask) -> AsyncIterator[Piece]:
        """Stream the tokens of an answer; closing the iterator cancels it in vLLM too.

        Raises Refused for a prompt that does not fit, PersonNotFound, StateCorrupt, OtherBank, QueueFull,
        EngineGone.
        """
        self._check(ask)
        pieces: Pieces = asyncio.Queue()
        task = asyncio.create_task(self._forward(ask, pieces))
        self._running[task] = pieces
        task.add_done_callback(self._running.pop)
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, MtaError):
                    raise piece
                yield piece
                if piece.finish:
                    return
        finally:
            task.cancel()

    async def forget(self, person: str) -> None:
        """End the person's running answers, unload their adapters, and delete the files. Raises EngineGone."""
        for task in self.adapters.answers(person):
            self._running[task].put_nowait(EngineGone("the person was forgotten", hint="Ask the pooled model: task"))
            task.cancel()
        await self.adapters.forget(person)

    async def versions(self) -> set[Version]:
        """Return the person versions that vLLM may have loaded. Raises EngineGone."""
        return await self.adapters.versions()

    def facts(self) -> dict[str, tuple[float, str]]:
        """Return metrics of answers, adapters, and truncation errors."""
        errors = self.adapters.errors
        return {
            "running": (len(self._running), "Answers running or waiting in vLLM"),
            "activated": (len(self.adapters), "Adapters that vLLM may have loaded"),
            "unloaded": (self.adapters.unloaded, "Adapters unloaded since the start"),
            "cut_error_mean": (sum(errors) / max(len(errors), 1), "Mean relative error of truncated merges"),
            "cut_error_max": (max(errors, default=0.0), "Largest relative error of truncated merges"),
        }

    async def close(self) -> None:
        """Finish running answers, accept no new ones, and stop."""
        self._closing = True
        await asyncio.gather(*self._running, return_exceptions=True)
        await self.adapters.settled()
        await self.client.aclose()
        await asyncio.to_thread(self.server.stop)

    def _check(self, ask: Ask) -> None:
        ask.check(self.length)
        if self._closing:
            raise EngineGone("the engine has stopped", hint=LATER)
        if len(self._running) >= self.most:
            raise QueueFull(f"{self.most} requests are running or waiting already", hint="Retry a little later.")

    async def _forward(self, ask: Ask, queue: Pieces) -> None:
        """Put the pieces of an answer, or its error, into the queue."""
        try:
            who = BASE if ask.who is TASK and not self.pooled else ask.who
            async with self.adapters.held(who) as name, aclosing(self._pieces(ask, name)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    queue.put_nowait(piece)
        except MtaError as error:
            queue.put_nowait(error)
        except httpx.HTTPError:
            queue.put_nowait(self.server.gone())
        except Exception:  # any failure must reach the caller and end only this answer
            queue.put_nowait(AnswerLost(LOST, hint=LATER))

    async def _pieces(self, ask: Ask, name: str) -> AsyncIterator[Piece]:
        request = self.client.build_request("POST", "/v1/completions", json=self._body(ask, name), timeout=_TIMEOUT)
        response = await _opened(asyncio.create_task(self.client.send(request, stream=True)))
        try:
            if response.status_code != 200:
                raise await asyncio.to_thread(self._error_of, ask.who, response.status_code)
            self.adapters.used(name)
            async for piece in _read(response, self.stops):
                yield piece
        finally:
            await response.aclose()

    def _body(self, ask: Ask, name: str) -> dict[str, Any]:
        """Return the request body. VLLM separates cached prefixes by adapter and by ``cache_salt``, here the caller."""
        body: dict[str, Any] = {"model": name, "prompt": list(ask.prompt)}
        body |= {"max_tokens": ask.max_tokens, "stream": True}
        body |= {"ignore_eos": True, "stop_token_ids": sorted(self.stops)}  # only our stop tokens end an answer
        body |= {"temperature": ask.temperature if ask.temperature >= COLDEST else 0.0, "top_p": ask.top_p}
        body |= {"return_token_ids": True, "stream_options": {"include_usage": True}}
        body["cache_salt"] = hmac.new(self._salt, ask.asker.encode(), hashlib.sha256).hexdigest()
        if ask.seed is not None:
            body["seed"] = ask.seed
        if ask.top_logprobs is not None:
            body |= {"logprobs": ask.top_logprobs, "return_tokens_as_token_ids": True}
        return body

    def _error_of(self, who: Version | Nobody, status: int) -> MtaError:
        """Return the error for a vLLM status; read the state here, because vLLM does not say what is wrong with it."""
        if isinstance(who, Version) and status in (400, 404):
            try:
                state = self.store.load(who.person, who.number)
            except MtaError as error:
                return error
            if state.bank != self.bank:
                return OtherBank("the person's state was made with another bank", hint="Personalize again.")
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


async def _read(response: httpx.Response, stops: Collection[int]) -> AsyncIterator[Piece]:
    """Convert server-sent events to pieces; the last piece has the number of cached prompt tokens.

    Raises EngineGone if the events end too early.
    """
    cached, finish = 0, None
    async for line in response.aiter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line[6:])
        if "error" in event:
            refused = event["error"].get("code", 500) < 500
            kind, verb = (AnswerLost, "refused") if refused else (EngineGone, "ended")
            raise kind(f"vLLM {verb} the answer", hint=LATER)
        details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens") or cached
        for choice in event["choices"]:
            for token in _tokens(choice):
                if token.id not in stops:
                    yield Piece(token)
            finish = choice.get("finish_reason") or finish
    if finish is None:
        raise EngineGone("vLLM ended the answer too early", hint=LATER)
    yield Piece(finish=_FINISH[finish], cached=cached)


_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length"}


def _tokens(choice: dict[str, Any]) -> list[Token]:
    ids, scores = choice.get("token_ids") or [], choice.get("logprobs")
    if not scores:
        return [Token(id) for id in ids]
    rows = zip(ids, scores["token_logprobs"], scores["top_logprobs"])
    return [Token(id, logprob, _top(top)) for id, logprob, top in rows]


def _top(alternatives: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    found = [(int(name.removeprefix(_ID)), logprob) for name, logprob in (alternatives or {}).items()]
    return tuple(sorted(found, key=lambda pair: -pair[1]))
