"""Limits per caller: shares, body size, answer length, history size, request rate; and the guard of all routes."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, defaultdict, deque

from fastapi import HTTPException
from pydantic import Field
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mta.config.loader import Settings
from mta.serving.api.schemas import error_body

log = logging.getLogger("mta")

_PATIENCE = 30.0  # seconds to receive a body
_CLOSE = {"Connection": "close"}


class Limits(Settings):
    """Limits per caller. ``rate`` is requests per minute and key; 0 means no limit."""

    body: int = Field(1 << 20, ge=1, description="bytes per request")
    max_tokens: int = Field(1024, ge=1, description="tokens per answer")
    items: int = Field(512, ge=1, description="items per history")
    item: int = Field(20_000, ge=1, description="characters per field of an item")
    rate: int = Field(0, ge=0)
    forgets: int = Field(10, ge=0, description="forget requests per minute for a person or prefix key; 0: no limit")
    own: int = Field(8, ge=1, description="concurrent answers for a person or prefix key")


class Shares:
    """What each key uses of a capacity: bytes, places in a queue, or answers. The operator's keys share the name "".

    Another key has at most ``each`` (by default a quarter), and all such keys together at most three quarters.
    """

    def __init__(self, capacity: int, each: int | None = None) -> None:
        self.capacity, self.each = capacity, capacity // 4 if each is None else each
        self.used = Counter[str]()

    def fits(self, key: str, size: int) -> bool:
        return self.giving_way(key, size) is None

    def giving_way(self, key: str, size: int) -> str | None:
        """Return the key that has to use less before ``key`` may use ``size`` more; None if it may do so now."""
        total, operator = self.used.total() + size, self.used[""]
        if key and self.used[key] + size > self.each:
            return key
        if key and total - operator > self.capacity * 3 // 4:
            return max((name for name in self.used if name), key=self.used.__getitem__, default=key)
        return "" if total > self.capacity else None


class Rate:
    """At most ``each`` requests of a key within any minute; 0 means no limit. Refused requests do not count."""

    def __init__(self, each: int) -> None:
        self.each = each
        self._latest: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=each))

    def count(self, key: str) -> None:
        """Count a request. Raises 429 with the seconds until the next request is allowed."""
        if not self.each:
            return
        now, latest = time.monotonic(), self._latest[key]
        if len(latest) == self.each and now - latest[0] < 60:
            wait = math.ceil(latest[0] + 60 - now)
            raise HTTPException(429, "too many requests for this key", headers={"Retry-After": str(wait)})
        latest.append(now)


class Guard:
    """Refuses bodies that are longer than ``most`` bytes or arrive too slowly, and hides unexpected exceptions.

    Callers get a 500 without details, and the log gets only the exception's type: its message may hold user data.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            body = await self._body(scope, receive)
        except TimeoutError:
            slow = f"the request did not arrive within {_PATIENCE:.0f} seconds"
            return await _refuse(408, slow, scope, receive, send)
        except ClientDisconnect:
            return None
        if body is None:
            return await _refuse(413, f"the request is longer than {self.most} bytes", scope, receive, send)
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        started = False

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, replay, watched)
        except Exception as error:
            log.error("a request failed: %s", type(error).__name__)
            if not started:
                failed = JSONResponse(error_body("internal server error", "server_error"), 500, _CLOSE)
                await failed(scope, receive, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body, or None as soon as it is too long. Raises TimeoutError, ClientDisconnect."""
        declared, body = dict(scope["headers"]).get(b"content-length", b"0"), b""
        if not declared.isdigit() or int(declared) > self.most:
            return None
        async with asyncio.timeout(_PATIENCE):
            async for chunk in Request(scope, receive).stream():
                body += chunk
                if len(body) > self.most:
                    return None
        return body


async def _refuse(status: int, message: str, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(error_body(message, "invalid_request_error"), status, _CLOSE)(scope, receive, send)
