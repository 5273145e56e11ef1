"""Bounds on what a caller may send: the size of a body, and how often."""

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

_PATIENCE = 30.0  # seconds for a body to come
_LINGER = 2.0  # seconds for the rest of one that is refused
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Limits(Settings):
    """What one caller may take. ``rate`` requests a minute for each key, 0 for as many as they like."""

    body: int = Field(1 << 20, ge=1, description="bytes of a request")
    max_tokens: int = Field(1024, ge=1, description="tokens of one answer")
    items: int = Field(512, ge=1, description="items of a person's history")
    item: int = Field(20_000, ge=1, description="characters of one field of an item")
    rate: int = Field(0, ge=0)
    forgets: int = Field(10, ge=0, description="forgettings a minute for a key of one person or prefix; 0: any number")
    own: int = Field(8, ge=1, description="answers at once for a key of one person or prefix; others share the engine")


class Rate:
    """A bucket of tokens for each caller, which fills up within a minute."""

    def __init__(self, each: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.each, self._clock = each, clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait(self, caller: str) -> float:
        """0 and one request fewer, or the seconds until the next is allowed."""
        if not self.each:
            return 0.0
        now = self._clock()
        left, before = self._buckets.get(caller, (float(self.each), now))
        left = min(left + (now - before) * self.each / 60, float(self.each))
        self._buckets[caller] = (left - (left >= 1), now)
        return 0.0 if left >= 1 else (1 - left) * 60 / self.each


class BodyLimit:
    """Refuses a body that is too long, told beforehand or not, before it is read to its end; waits for none forever."""

    def __init__(self, app: Any, most: int, refusal: bytes) -> None:
        self.app, self.most, self.refusal = app, most, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if not told.isdigit() or int(told) > self.most:
            return await self._refuse(receive, send)
        try:
            async with asyncio.timeout(_PATIENCE):
                body = await self._body(receive)
        except TimeoutError:
            return None  # the server ends the connection
        if body is None:
            return None
        if len(body) > self.most:
            return await self._refuse(receive, send)
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> MutableMapping[str, Any]:
            return whole.pop() if whole else await receive()

        return await self.app(scope, again, send)

    async def _body(self, receive: Receive) -> bytes | None:
        """The body, or a little more than is allowed of it; None where the caller has gone."""
        body, more = b"", True
        while more and len(body) <= self.most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body, more = body + message.get("body", b""), message.get("more_body", False)
        return body

    async def _refuse(self, receive: Receive, send: Send) -> None:
        """The refusal, and for a while what is still coming is read and dropped.

        A connection that is closed upon unread bytes is reset, and the caller would lose the refusal with it.
        """
        await _answer(send, 413, self.refusal, ended=False)
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b""})


class Unexpected:
    """What went wrong that nobody foresaw: 500 without a word of it to the caller, and its kind alone to the log."""

    def __init__(self, app: Any, refusal: bytes) -> None:
        self.app, self.refusal = app, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:  # its message may hold what somebody wrote
            log.error("a request failed: %s", type(error).__name__)
            if scope["type"] == "http" and not begun:
                await _answer(send, 500, self.refusal)


async def _answer(send: Send, status: int, body: bytes, ended: bool = True) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": not ended})
