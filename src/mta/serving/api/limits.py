"""Limits per caller: body size, answer length, history size, and request rate; plus the catch-all for errors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from pydantic import Field

from mta.config.loader import Settings

log = logging.getLogger("mta")

_PATIENCE = 30.0  # seconds to receive a body
_LINGER = 2.0  # seconds to read the rest of a refused body
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Limits(Settings):
    """Limits per caller. ``rate`` is requests per minute and key; 0 means no limit."""

    body: int = Field(1 << 20, ge=1, description="bytes per request")
    max_tokens: int = Field(1024, ge=1, description="tokens per answer")
    items: int = Field(512, ge=1, description="items per history")
    item: int = Field(20_000, ge=1, description="characters per field of an item")
    rate: int = Field(0, ge=0)
    forgets: int = Field(10, ge=0, description="forget requests per minute for a person or prefix key; 0: no limit")
    own: int = Field(8, ge=1, description="concurrent answers for a person or prefix key")


class Rate:
    """Token bucket per caller, with ``each`` requests per minute; 0 means no limit."""

    def __init__(self, each: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.each, self._clock = each, clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait(self, caller: str) -> float:
        """Count a request and return 0, or return the seconds until the next request is allowed."""
        if not self.each:
            return 0.0
        now = self._clock()
        left, before = self._buckets.get(caller, (float(self.each), now))
        left = min(left + (now - before) * self.each / 60, float(self.each))
        self._buckets[caller] = (left - (left >= 1), now)
        return 0.0 if left >= 1 else (1 - left) * 60 / self.each


class BodyLimit:
    """Refuses a body of more than ``most`` bytes without reading it all, and drops callers that send too slowly."""

    def __init__(self, app: Any, most: int, refusal: bytes) -> None:
        self.app, self.most, self.refusal = app, most, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.most:
            return await self._refuse(receive, send)
        try:
            async with asyncio.timeout(_PATIENCE):
                body = await self._body(receive)
        except TimeoutError:
            return None  # the server closes the connection
        if body is None:
            return None
        if len(body) > self.most:
            return await self._refuse(receive, send)
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> MutableMapping[str, Any]:
            return whole.pop() if whole else await receive()

        return await self.app(scope, replay, send)

    async def _body(self, receive: Receive) -> bytes | None:
        """Return the body, cut off soon after the limit, or None if the caller disconnected."""
        body, more = b"", True
        while more and len(body) <= self.most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body, more = body + message.get("body", b""), message.get("more_body", False)
        return body

    async def _refuse(self, receive: Receive, send: Send) -> None:
        """Send the refusal, then read and drop the rest of the body for a while.

        Closing a connection with unread bytes resets it, and the caller would lose the refusal.
        """
        await _answer(send, 413, self.refusal, ended=False)
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b""})


class Unexpected:
    """Turns an unexpected exception into a 500 without details; logs only the exception's type."""

    def __init__(self, app: Any, refusal: bytes) -> None:
        self.app, self.refusal = app, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:  # the message may hold user data
            log.error("a request failed: %s", type(error).__name__)
            if scope["type"] == "http" and not started:
                await _answer(send, 500, self.refusal)


async def _answer(send: Send, status: int, body: bytes, ended: bool = True) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": not ended})
