"""Bounds on what a caller may send: the size of a body, and how often."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pydantic import Field

from mta.config import Settings

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
    """Refuses a body that is too long, whether its length is told beforehand or not, before it is read to its end."""

    def __init__(self, app: Any, most: int, refusal: bytes) -> None:
        self.app, self.most, self.refusal = app, most, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if not told.isdigit() or int(told) > self.most:
            return await self._refuse(send)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > self.most:
                return await self._refuse(send)
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> MutableMapping[str, Any]:
            return whole.pop() if whole else await receive()

        return await self.app(scope, again, send)

    async def _refuse(self, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": self.refusal})
