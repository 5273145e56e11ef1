"""Shared by the gateway's routes: the service and the caller's key."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Response
from fastapi import Request as HttpRequest
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from mta.bank.format import INFO
from mta.bank.notes import parts_to_rebuild
from mta.data.earlier import in_words
from mta.data.history import Item
from mta.data.tasks.task import Task
from mta.errors import DataError, MtaError, OtherBank
from mta.model.base import BaseModel
from mta.personalize.adapters import BASE, TASK, SharedModel
from mta.serving.api.auth import LOCAL, LOOPBACK, Key, Keys
from mta.serving.api.errors import NeedsRebuild, UnknownOrForbidden, status_of
from mta.serving.api.histories import Histories
from mta.serving.api.jobs import Jobs
from mta.serving.api.limits import Limits, Rate, Shares
from mta.serving.api.metrics import Metrics
from mta.serving.api.schemas import BehindItems, ModelRequest
from mta.serving.engine import Engine, QueueFull, Refused, ServedModel, Version, named
from mta.store import Session, Store
from mta.system.atomic import read_json

log = logging.getLogger("mta")
P = ParamSpec("P")
T = TypeVar("T")
_WORKERS = 4  # threads that tokenize and format


class Earlier(NamedTuple):
    """Items in front of a prompt, the oldest first, and the ``asker`` under which the engine keeps what it computes."""

    items: tuple[Item, ...]
    asker: str
    person: str = ""
    session: Session | None = None  # began before the items were read

    async def check(self) -> None:
        """Raise PersonForgotten if the person of the items was forgotten meanwhile."""
        if self.session:
            await run_in_threadpool(self.session.check, self.person)


def _asker_for(key: Key, person: str) -> str:
    """Return the asker of requests with a key that show a person's items: forgetting the person drops these."""
    return f"{key.name}\n{person}"


@dataclass
class Service:
    """Everything the routes use.

    ``history`` is the number of earlier items that the bank's prompts show at most.
    ``strict_bank`` is the folder and the hash of the bank in memory: it must not be served once it contains a forgotten
    person, or its folder holds another bank, which may have been built without one.
    ``sweep`` is the number of seconds between two checks for people that other processes forgot.
    """

    engine: Engine
    base: BaseModel
    store: Store
    task: Task
    keys: Keys
    jobs: Jobs
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    strict_bank: tuple[Path, str] | None = None
    is_stale: bool = False
    sweep: float = 10.0
    history: int = 0
    rate: Rate = field(init=False)
    forgets: Rate = field(init=False)
    histories: Histories = field(init=False)
    _workers: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(_WORKERS), init=False)
    answers: Shares = field(init=False)  # open ones
    _shown: set[str] = field(default_factory=set, init=False)  # people whose items were in prompts
    _swept: Session | None = field(default=None, init=False)  # of the latest sweep
    _locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary, init=False)
    _turns: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary, init=False)  # by key

    def __post_init__(self) -> None:
        self.rate, self.forgets = Rate(self.limits.rate), Rate(self.limits.forgets)
        self.histories = Histories(self.store, self.limits.items)
        self.answers = Shares(self.engine.most, self.limits.own)

    async def apart_from_store(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result of ``work``, computed in a thread that never waits for a store.

        So a store that hangs stops no answers of the pooled model and the base.
        """
        return await to_thread.run_sync(partial(work, *args, **kwargs), limiter=self._workers)

    async def in_turn(self, key: Key, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do the same, but one at a time for each person or prefix key: its long prompts delay no other caller."""
        async with self._turns.setdefault(key.share, asyncio.Lock()) if key.share else nullcontext():
            return await self.apart_from_store(work, *args, **kwargs)

    async def resolve_model(self, model: str, key: Key, fallback: Literal["task", "base"] | None = None) -> ServedModel:
        """Resolve a model name. Unknown and forbidden people get the same answer, to hide which people exist.

        The store is read each time, so a person forgotten by another process is not served from memory. If the person
        does not exist, ``fallback`` answers, if given. Raises UnknownOrForbidden, NeedsRebuild.
        """
        who = named(model, self.base.name)
        if isinstance(who, Version):
            stored = await run_in_threadpool(self._stored, who) if key.may_ask(who.person) else None
            who = stored or (SharedModel(fallback) if fallback else None)
        if who is not None:
            await self.check_fresh(who)
            return who
        raise UnknownOrForbidden(
            f"the model {model!r} does not exist, or this key may not use it",
            hint="GET /v1/models lists available models; with fallback: task the pooled model answers instead.",
        )

    async def with_fallback(
        self, kind: str, request: ModelRequest, key: Key, answer: Callable[[ServedModel], Awaitable[Response]]
    ) -> Response:
        """Return the answer of the model that a request names, or of its ``fallback`` for a state of another bank."""
        try:
            who = await self.resolve_model(request.model, key, request.fallback)
            try:
                return await answer(who)
            except OtherBank:
                if request.fallback is None:
                    raise
            return await answer(SharedModel(request.fallback))
        except MtaError as error:
            self.count_error(kind, error)
            raise

    async def check_fresh(self, who: ServedModel | None = None) -> None:
        """Raises NeedsRebuild if the bank in memory must not be served (``strict_bank``), except for the base."""
        if who is BASE or not self.strict_bank:
            return
        fresh = await self.apart_from_store(_is_fresh, *self.strict_bank)
        self.is_stale |= fresh is False  # permanent: the weights in memory stay stale even if the folder is rebuilt
        if self.is_stale or not fresh:
            raise NeedsRebuild(
                "the bank holds a forgotten person, cannot be read, or its folder holds another bank by now",
                hint="Start the server again with the rebuilt bank. Ask the base meanwhile.",
            )

    def _stored(self, who: Version) -> Version | None:
        number = who.number or self.store.latest(who.person)
        seal = self.store.seal(who.person, number) if number else None
        return None if seal is None or not number else replace(who, number=number, seal=seal)

    def name_of(self, who: ServedModel, requested: str) -> str:
        """Return the name of the model that answers, which is another one after a fallback."""
        names: dict[ServedModel, str] = {TASK: TASK.value, BASE: self.base.name}
        return names.get(who, requested)

    def chat_tokens(self, turns: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Return the tokens of a conversation. Raises Refused for messages that the base's chat template rejects."""
        try:
            return self.base.prompts.chat(turns)
        except DataError as error:
            raise Refused(error.message, hint="Send other messages.") from None

    async def earlier(self, request: BehindItems, key: Key) -> Earlier:
        """Return the items in front of a request's prompt.

        An answer can repeat them, so only a key that may see the person's data gets them. Raises UnknownOrForbidden
        for another person in ``history_of``.
        """
        asked, person = named(request.model, self.base.name), request.history_of
        if person is None:
            person = asked.person if isinstance(asked, Version) and key.owns(asked.person) else ""
        if not self.history or not person:
            return Earlier((), key.name)
        if not key.owns(person):
            raise UnknownOrForbidden("history_of names a person whose data this key may not see", hint="Leave it out.")
        session = await run_in_threadpool(self.store.session, person)
        known = await run_in_threadpool(self.histories.of, person)
        if not known:
            return Earlier((), key.name)
        self._shown.add(person)
        return Earlier(known.items[-self.history :], _asker_for(key, person), person, session)

    def behind(self, earlier: Sequence[Item], text: str, fits: Callable[[str], bool]) -> str:
        """Return a prompt behind as many of the ``earlier`` items as fit; the oldest are left out first."""
        while earlier and not fits(longer := in_words(self.task, earlier) + text):
            earlier = earlier[1:]
        return longer if earlier else text

    def lock(self, person: str) -> asyncio.Lock:
        """Return the lock for changes to a person's data, so that forgetting never interleaves with another change."""
        return self._locks.setdefault(person, asyncio.Lock())

    @contextmanager
    def counted(self, kind: str, key: Key, count: int = 1) -> Iterator[None]:
        """Reserve ``count`` answers for a key, so that no person key can take all slots, and count a success.

        Raises QueueFull.
        """
        start = time.monotonic()
        if not self.answers.fits(key.share, count):
            allowed = f"; this key may have at most {self.limits.own} at once" if key.share else ""
            raise QueueFull(f"too many answers are running or waiting{allowed}", hint="Wait for one to end.")
        self.answers.used[key.share] += count
        self.metrics.open.inc(count)
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.metrics.requests.labels(kind, "cancelled").inc()
            raise
        finally:
            self.metrics.open.dec(count)
            self.answers.used[key.share] -= count
        self.metrics.answer.observe(time.monotonic() - start)
        self.metrics.requests.labels(kind, "ok").inc()

    def count_error(self, kind: str, error: MtaError) -> None:
        """Count a request that ends with an error."""
        self.metrics.requests.labels(kind, str(status_of(error))).inc()

    async def keep_sweeping(self) -> None:
        """Sweep every ``sweep`` seconds until cancelled; retry if the store does not answer."""
        while True:
            try:
                await self.drop_forgotten_elsewhere()
            except Exception as error:  # no error may end the loop
                log.warning("cannot read which people were forgotten elsewhere: %s", type(error).__name__)
            await asyncio.sleep(self.sweep)

    async def drop_forgotten_elsewhere(self) -> None:
        """Drop people from memory whom another process forgot (``mta forget``, another gateway).

        Each request checks the tombstones too, so no answer uses older data; this drops data that no request asks for.
        The engine's versions are compared with the store: the person may have a new state already. Raises StoreError,
        EngineGone.
        """
        await run_in_threadpool(self.histories.drop_forgotten)
        await self.jobs.drop_forgotten()
        session = await run_in_threadpool(self.store.session)
        owners = {key.scope for key in self.keys.keys if key.rights == "person"} | self._shown
        gone = await run_in_threadpool(self._swept.forgotten, owners) if self._swept else ()
        removed = await run_in_threadpool(self._removed, await self.engine.versions())
        self._shown -= set(gone)
        askers = [name for id in gone for name in self.keys_of(id)]
        if removed or askers:
            await self.engine.drop(removed, askers)
        self._swept = session

    async def has_forgotten(self, person: str) -> None:
        """Note that this gateway forgot a person, so that the next sweep does not end answers that began later."""
        self._shown.discard(person)
        if self._swept:
            self._swept = Session.joint([self._swept, await run_in_threadpool(self.store.session, person)])

    def keys_of(self, person: str) -> list[str]:
        """Return the askers of what is dropped with a person: the person's own keys, and all that showed the items."""
        own = [key.name for key in self.keys.keys if key.rights == "person" and key.scope == person]
        return own + [_asker_for(key, person) for key in (*self.keys.keys, LOCAL)]

    def _removed(self, versions: Collection[Version]) -> set[Version]:
        """Return the versions that the store no longer has, or has with other content."""
        seals = {version: self.store.seal(version.person, version.number) for version in versions}
        return {
            version
            for version, seal in seals.items()
            if seal is None or seal[: len(version.seal) or None] != version.seal  # vLLM names shorten seals
        }


def _is_fresh(folder: Path, loaded: str) -> bool | None:
    """Return whether a folder still holds the bank with the hash ``loaded``, without a forgotten person in it.

    None if the bank cannot be read now.
    """
    described = read_json(folder / INFO)
    if not isinstance(described, dict):
        return None
    return described.get("hash") == loaded and not parts_to_rebuild(folder)


async def gateway(request: HttpRequest) -> Service:
    """Return the service of the application that received a request."""
    service: Service = request.app.state.service
    return service


Gateway = Annotated[Service, Depends(gateway)]
Shown = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


async def key_of(request: HttpRequest, service: Gateway, shown: Shown) -> Key:
    """Return the caller's key. Raises 401 without a valid key, 429 if the key exceeds its rate."""
    key = service.keys.of(shown.credentials) if shown else None
    if not service.keys.keys:
        key = _local(request)
    if key is None:
        raise HTTPException(401, "no valid API key: send 'Authorization: Bearer <key>'")
    service.rate.count(key.name)
    return key


Caller = Annotated[Key, Depends(key_of)]


def _local(request: HttpRequest) -> Key:
    """Accept programs on this machine, but not a foreign page open in a local browser. Raises 403."""
    origin, url = request.headers.get("origin"), request.url
    if url.hostname not in LOOPBACK or origin not in (None, f"{url.scheme}://{url.netloc}"):
        raise HTTPException(403, "without keys, only pages and programs of this machine are answered")
    return LOCAL
