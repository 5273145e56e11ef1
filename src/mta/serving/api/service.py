"""What the gateway's routes share: the service, who is calling, and how errors are told."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal
from weakref import WeakValueDictionary

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from mta.bank.format import INFO, stale
from mta.data.tasks.task import Task
from mta.errors import MtaError, PersonForgotten, PersonNotFound
from mta.model.base import BaseModel
from mta.personalize.adapters import BASE, TASK
from mta.serving.api.auth import LOCAL, Key, Keys
from mta.serving.api.histories import Histories
from mta.serving.api.jobs import Jobs
from mta.serving.api.limits import Limits, Rate
from mta.serving.api.metrics import Metrics
from mta.serving.api.schemas import error_body
from mta.serving.engine import LATER, LOST, AnswerLost, Engine, EngineGone, QueueFull, Refused, Version, Who
from mta.serving.model_names import Named, named
from mta.store import Store

log = logging.getLogger("mta")


class NeedsRebuild(MtaError):
    """Somebody forgotten is in what would answer, and that is not served (``--strict``)."""


class NobodyHere(PersonNotFound):
    """Somebody unknown, or whom this key may not know: the same to whoever asks."""


@dataclass
class Service:
    """What the routes work with. ``length`` is how many tokens prompt and answer may have together.

    ``strict`` are the folders of banks that are not to be served once somebody they learnt from was forgotten.
    ``sweep`` is the number of seconds between two looks for people whom other processes forgot.
    """

    engine: Engine
    base: BaseModel
    store: Store
    task: Task
    keys: Keys
    jobs: Jobs
    limits: Limits = field(default_factory=Limits)
    length: int = 1024
    metrics: Metrics = field(default_factory=Metrics)
    strict: Sequence[Path] = ()
    is_stale: bool = False
    sweep: float = 10.0
    rate: Rate = field(init=False)
    forgets: Rate = field(init=False)
    histories: Histories = field(init=False)
    _held: Counter[str] = field(default_factory=Counter, init=False)
    _locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary, init=False)

    def __post_init__(self) -> None:
        self.rate, self.forgets = Rate(self.limits.rate), Rate(self.limits.forgets)
        self.histories = Histories(self.store, self.limits.items)

    async def who(self, model: str, key: Key, fallback: Literal["task", "base"] | None = None) -> Who:
        """Whom a request means. Unknown and forbidden people are answered alike, so nobody learns who exists.

        The store is asked each time: who was forgotten elsewhere is not served from what is at hand here. Instead of
        a person who is not here ``fallback`` answers, if it is named. Raises NobodyHere, NeedsRebuild.
        """
        found = named(model, self.base.name)
        if isinstance(found, Named):
            version = await run_in_threadpool(self._version, found) if key.may_ask(found.person) else None
            who = version or {"task": TASK, "base": BASE}.get(fallback or "")
        else:
            who = found
        if who is not None:
            await self.check_fresh(who)
            return who
        raise NobodyHere(
            f"the model {model!r} does not exist, or this key may not ask it",
            hint="GET /v1/models lists some that it may; fallback: task asks the pooled model then.",
        )

    async def check_fresh(self, who: Who | None = None) -> None:
        """Raises NeedsRebuild for all but the base, where somebody forgotten is in task LoRA or bank."""
        if who is BASE or not self.strict:
            return
        # Once and for all: what is in memory stays what it was, whatever becomes of the folder.
        for bank in self.strict:
            gone = not (bank / INFO).exists()
            self.is_stale = self.is_stale or gone or bool(await run_in_threadpool(stale, bank))
        if self.is_stale:
            raise NeedsRebuild("the bank has to be rebuilt without somebody who was forgotten", hint="Ask the base.")

    def _version(self, found: Named) -> Version | None:
        number = found.version or self.store.latest(found.person)
        seal = self.store.seal(found.person, number) if number else None
        return None if seal is None or not number else Version(found.person, number, found.stacked, seal)

    def lock(self, person: str) -> asyncio.Lock:
        """Held by whatever changes what is kept of a person, so that forgetting comes before or after it, not amid."""
        return self._locks.setdefault(person, asyncio.Lock())

    @contextmanager
    def held(self, key: Key, count: int) -> Iterator[None]:
        """So many answers for a key, for a block: no person's own key can take all slots. Raises QueueFull."""
        if key.share and self._held[key.name] + count > self.limits.own:
            raise QueueFull(f"this key has at most {self.limits.own} answers at once", hint="Wait for one to end.")
        self._held[key.name] += count
        try:
            yield
        finally:
            self._held[key.name] -= count


async def key_of(
    request: Request,
    shown: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))] = None,
) -> Key:
    """The caller's key. Raises 401 where none is shown or it is not known, 429 where it comes too often."""
    service: Service = request.app.state.service
    key = service.keys.of(shown.credentials) if shown else None
    if not service.keys.keys:
        key = _local(request)
    if key is None:
        raise HTTPException(401, "no API key, or one that is not known here: send 'Authorization: Bearer <key>'")
    check_rate(service.rate, key)
    return key


def check_rate(rate: Rate, key: Key) -> None:
    """Count one more request of a key. Raises 429 where it comes too often."""
    if wait := rate.wait(key.name):
        raise HTTPException(429, "too many requests for this key", headers={"Retry-After": str(math.ceil(wait))})


def _local(request: Request) -> Key:
    """Whoever sits at this machine; not a page of somebody else's that their browser has open. Raises 403."""
    origin = request.headers.get("origin")
    if request.url.hostname not in _HERE or origin not in (None, f"{request.url.scheme}://{request.url.netloc}"):
        raise HTTPException(403, "without keys only this machine's own pages and programs are answered")
    return LOCAL


_HERE = ("127.0.0.1", "localhost", "::1")
Caller = Annotated[Key, Depends(key_of)]


def error_of(error: MtaError) -> tuple[int, dict[str, object], dict[str, str]]:
    """Status, body and headers for what went wrong.

    Callers are told what was raised for them, hint and all; hints of all else are the operator's, and stay here.
    """
    message = f"{error.message}. {error.hint}"
    if isinstance(error, PersonNotFound):  # the store's own words tell where it lies, and which versions there are
        message = message if isinstance(error, NobodyHere) else "the person is not here any more"
        return 404, error_body(message, "invalid_request_error", "model_not_found", "model"), {}
    if isinstance(error, PersonForgotten):
        message = "the person was forgotten while this was done: nothing was kept. Send it again if they are back"
        return 409, error_body(message, "invalid_request_error", "person_forgotten"), {}
    if isinstance(error, QueueFull):
        return 429, error_body(message, "rate_limit_error", "queue_full"), {"Retry-After": str(error.retry_after)}
    if isinstance(error, NeedsRebuild):
        return 503, error_body(message, "server_error", "needs_rebuild"), {}
    if isinstance(error, EngineGone):
        return 503, error_body(message, "server_error", "engine_gone"), {"Retry-After": "5"}
    if isinstance(error, AnswerLost):
        return 500, error_body(f"{LOST}. {LATER}", "server_error", "answer_lost"), {}
    if isinstance(error, Refused):
        return 400, error_body(message, "invalid_request_error"), {}
    log.error("a request failed: %s", type(error).__name__)  # its message may say where things lie
    return 500, error_body("this cannot be done at the moment", "server_error", type(error).__name__), {}
