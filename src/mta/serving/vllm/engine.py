"""The vLLM engine: a real vLLM server behind the gateway, which knows each version of a person by a name of its own."""

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
from mta.serving.vllm.registry import Names
from mta.serving.vllm.server import Remote, VllmServer
from mta.store import Store

_UNTIL = httpx.Timeout(30, read=600)  # a row may wait long for its first token
_ID = "token_id:"  # how vLLM names tokens where ids were asked for
Told = asyncio.Queue[Piece | MtaError]


class VllmEngine:
    """Answers by a vLLM server, which ends with the engine if it is our own.

    A prompt and its answer have ``length`` tokens together; more than ``most`` answers at once are refused.
    ``activated`` adapters that nobody needs stay loaded. ``pooled`` tells whether the bank has a task LoRA; without one
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
        self.names = Names(self.client, server.folder, activated)
        self._salt = secrets.token_bytes(32)
        self._told: dict[asyncio.Task[None], Told] = {}
        self._closing = False

    @property
    def ready(self) -> bool:
        """Whether requests would be answered, as far as is known here."""
        return not self._closing and self.server.up

    @property
    def alive(self) -> bool:
        """Always: a server that ends is started again."""
        return True

    async def answer(self, ask: Ask) -> AsyncIterator[Piece]:
        """The tokens of an answer as they come; closing the iterator ends it in vLLM too.

        Raises Refused for a prompt that does not fit, PersonNotFound, StateCorrupt, OtherBank, QueueFull,
        EngineGone.
        """
        self._check(ask)
        told: Told = asyncio.Queue()
        task = asyncio.create_task(self._answered(ask, told))
        self._told[task] = told
        task.add_done_callback(self._told.pop)
        try:
            while True:
                piece = await told.get()
                if isinstance(piece, MtaError):
                    raise piece
                yield piece
                if piece.finish:
                    return
        finally:
            task.cancel()

    async def forget(self, person: str) -> None:
        """End what runs for a person, unload their adapters and delete their files. Raises EngineGone."""
        for task in self.names.answers(person):
            self._told[task].put_nowait(EngineGone("the person was forgotten", hint="Ask the pooled model: task"))
            task.cancel()
        await self.names.forget(person)

    async def versions(self) -> set[Version]:
        """The versions of people whose adapters vLLM may hold. Raises EngineGone."""
        return await self.names.versions()

    def facts(self) -> dict[str, tuple[float, str]]:
        """Answers, adapters, and what their cut to vLLM's slots loses."""
        errors = self.names.errors
        return {
            "running": (len(self._told), "Answers that run or wait in vLLM"),
            "activated": (len(self.names), "Adapters vLLM may hold"),
            "unloaded": (self.names.unloaded, "Adapters that were unloaded, since the start"),
            "starts": (self.server.starts, "Times vLLM was started here"),
            "cut_error_mean": (sum(errors) / max(len(errors), 1), "Relative error of merges cut to a slot's rank"),
            "cut_error_max": (max(errors, default=0.0), "The largest of them"),
        }

    async def close(self) -> None:
        """Answer what is running, take nothing new, and stop."""
        self._closing = True
        await asyncio.gather(*self._told, return_exceptions=True)
        await self.names.settled()
        await self.client.aclose()
        await asyncio.to_thread(self.server.stop)

    def _check(self, ask: Ask) -> None:
        ask.check(self.length)
        if self._closing:
            raise EngineGone("the engine has stopped", hint=LATER)
        if len(self._told) >= self.most:
            raise QueueFull(f"{self.most} requests are running or waiting already", hint="Come again a little later.")

    async def _answered(self, ask: Ask, told: Told) -> None:
        """Whatever happens to an answer, told to who waits for it."""
        try:
            who = BASE if ask.who is TASK and not self.pooled else ask.who
            async with self.names.held(who) as name, aclosing(self._pieces(ask, name)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    told.put_nowait(piece)
        except MtaError as error:
            told.put_nowait(error)
        except httpx.HTTPError:
            told.put_nowait(EngineGone("vLLM does not answer", hint=LATER))
        except Exception:  # whatever it is, whoever waits is told, and nobody else is touched
            told.put_nowait(AnswerLost(LOST, hint=LATER))

    async def _pieces(self, ask: Ask, name: str) -> AsyncIterator[Piece]:
        request = self.client.build_request("POST", "/v1/completions", json=self._body(ask, name), timeout=_UNTIL)
        response = await _whole(asyncio.create_task(self.client.send(request, stream=True)))
        try:
            if response.status_code != 200:
                raise await asyncio.to_thread(self._refused, ask.who, response.status_code)
            self.names.used(name)
            async for piece in _read(response, self.stops):
                yield piece
        finally:
            await response.aclose()

    def _body(self, ask: Ask, name: str) -> dict[str, Any]:
        """VLLM keeps prefixes apart by adapter and by ``cache_salt``: what one caller asked serves no other."""
        body: dict[str, Any] = {"model": name, "prompt": list(ask.prompt)}
        body |= {"max_tokens": ask.max_tokens, "stream": True}
        body |= {"ignore_eos": True, "stop_token_ids": sorted(self.stops)}  # what ends an answer is said here alone
        body |= {"temperature": ask.temperature if ask.temperature >= COLDEST else 0.0, "top_p": ask.top_p}
        body |= {"return_token_ids": True, "stream_options": {"include_usage": True}}
        body["cache_salt"] = hmac.new(self._salt, ask.asker.encode(), hashlib.sha256).hexdigest()
        if ask.seed is not None:
            body["seed"] = ask.seed
        if ask.top_logprobs is not None:
            body |= {"logprobs": ask.top_logprobs, "return_tokens_as_token_ids": True}
        return body

    def _refused(self, who: Version | Nobody, status: int) -> MtaError:
        """Why vLLM gave no answer: what is wrong with a person's state it does not say, so that is looked up here."""
        if isinstance(who, Version) and status in (400, 404):
            try:
                state = self.store.load(who.person, who.number)
            except MtaError as error:
                return error
            if state.bank != self.bank:
                return OtherBank("the person's state was made with another bank", hint="Personalize again.")
        return (AnswerLost if status < 500 else EngineGone)(f"vLLM answered {status}, expected 200", hint=LATER)


async def _whole(opening: asyncio.Task[httpx.Response]) -> httpx.Response:
    """The response, once vLLM has begun to answer: who leaves before that still waits for it.

    Until then vLLM may be loading the adapter, and whoever unloads it meanwhile would leave it half there.
    """
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        while not opening.done():  # whoever is cancelled may be so again
            with suppress(asyncio.CancelledError):
                await asyncio.wait((opening,))
        if not opening.cancelled() and opening.exception() is None:
            await opening.result().aclose()
        raise


async def _read(response: httpx.Response, stops: Collection[int]) -> AsyncIterator[Piece]:
    """Server-sent events of a completion as pieces; how much of the prompt was known is told last of all.

    Raises EngineGone where they end too early.
    """
    cached, finish = 0, None
    async for line in response.aiter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line[6:])
        if "error" in event:
            refused = event["error"].get("code", 500) < 500
            kind, did = (AnswerLost, "refused") if refused else (EngineGone, "ended")
            raise kind(f"vLLM {did} the answer", hint=LATER)
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
    ids, said = choice.get("token_ids") or [], choice.get("logprobs")
    if not said:
        return [Token(id) for id in ids]
    rows = zip(ids, said["token_logprobs"], said["top_logprobs"])
    return [Token(id, logprob, _top(top)) for id, logprob, top in rows]


def _top(alternatives: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    found = [(int(name.removeprefix(_ID)), logprob) for name, logprob in (alternatives or {}).items()]
    return tuple(sorted(found, key=lambda pair: -pair[1]))
