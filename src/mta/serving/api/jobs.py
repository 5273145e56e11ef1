"""Background personalization (stages 2 and 3): waiting people are personalized in batches, in one thread at a time.

A state is updated if the history is the earlier one with new items (``mta.personalize.update``); otherwise it is made
anew.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

from starlette.concurrency import run_in_threadpool

from mta.data.history import Person
from mta.errors import Diverged, InputError, MtaError, PersonNotFound
from mta.personalize import Personalizer
from mta.personalize.forgetting import Forgotten
from mta.serving.api.auth import LOCAL, Key
from mta.serving.api.errors import public_message
from mta.serving.api.limits import Shares
from mta.serving.engine import QueueFull
from mta.store import Session, Store
from mta.system.device import compute_with

log = logging.getLogger("mta")
TOGETHER, ITEMS = 32, 256  # people, and their items, per job: forgetting and other keys' people wait for one
REMEMBERED = 4096  # finished people whose status is still reported
_PATIENCE = 20.0  # seconds that a running job has once the gateway stops


@dataclass(frozen=True, slots=True)
class Status:
    """Progress of a person's personalization; ``version`` is set when done."""

    state: Literal["waiting", "running", "done", "failed"]
    version: int | None = None
    message: str = ""


@dataclass(slots=True, eq=False)
class _Entry:
    """A person's place in the queue, and later the result, without ``person``."""

    person: Person | None
    share: str  # of the key that put the person; "" is the operator
    session: Session  # which began before the items were read
    status: Status = Status("waiting")


class Jobs:
    """Queue of at most ``most`` people waiting for personalization, and the job that runs; for one event loop.

    The personalizer works on its own modules (``BaseModel.twin``) and on one core, so that answers continue meanwhile.
    If the base of ``personal`` has no weights, ``load`` returns the personalizer that trains, before the first job.
    """

    def __init__(self, personal: Personalizer, most: int = 256, load: Callable[[], Personalizer] | None = None) -> None:
        self.personal, self.most = personal, most
        self._load, self._trainer = load or (lambda: personal), None if load else personal
        self._entries: dict[str, _Entry] = {}  # by person, in the order of the queue
        self._running: dict[str, _Entry] = {}
        self._job: asyncio.Future[dict[str, Status]] | None = None  # of the running people; ``close`` cancels it
        self._working: asyncio.Task[None] | None = None  # runs one job after another, while people wait
        self._closed = False

    def put(self, person: Person, session: Session, key: Key = LOCAL) -> Status:
        """Queue a person for personalization; a person already waiting gets the new items.

        ``session`` began before the items were read. Raises QueueFull if the key's share of the queue is full.
        """
        entry, waiting, places = _Entry(person, key.share, session), self._waiting(), Shares(self.most)
        for id, other in waiting.items():
            if id != person.id:
                places.used[other.share] += 1
        if not places.fits(key.share, 1):
            raise QueueFull("too many people are waiting to be personalized", hint="Retry later.")
        if person.id not in waiting:
            self._entries.pop(person.id, None)  # a new entry goes to the end of the queue
        self._entries[person.id] = entry
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return entry.status

    def _waiting(self) -> dict[str, _Entry]:
        return {id: entry for id, entry in self._entries.items() if entry.status.state == "waiting"}

    def _next(self) -> dict[str, _Entry]:
        """Return who is personalized now: the first people of the queue, as many as fit into a job, at least one."""
        chosen, items = dict[str, _Entry](), 0
        for id, entry in self._waiting().items():
            items += len(entry.person.items) if entry.person else 0
            if chosen and (items > ITEMS or len(chosen) == TOGETHER):
                break
            chosen[id] = entry
        return chosen

    def status(self, person: str) -> Status | None:
        """Return a person's progress, or None if nothing was requested since the server started or the forgetting."""
        entry = self._entries.get(person)
        return entry.status if entry and not entry.session.forgotten([person]) else None

    async def forget(self, person: str) -> Forgotten:
        """Remove a person from the queue, and delete everything stored about the person.

        Waits for the running job if the person is in it. The caller must not put or forget the same id meanwhile.
        """
        self._entries.pop(person, None)
        report = await run_in_threadpool(self.personal.forget, person, keep_exports=True)
        if self._job and person in self._running:  # which saves nothing of the person from the tombstone on
            await asyncio.wait([self._job])
            await run_in_threadpool(self.personal.forget, person, keep_exports=True)  # what it was writing just then
        return report

    async def drop_forgotten(self) -> None:
        """Drop waiting people and statuses of people who were forgotten since.

        For running people, ``Personalizer.update`` saves nothing and no status is set.
        """
        if before := dict(self._entries):
            session = Session.joint(entry.session for entry in before.values())
            for id in await run_in_threadpool(session.forgotten, before):
                if self._entries.get(id) is before[id]:  # else it was put again
                    del self._entries[id]

    async def close(self, patience: float = _PATIENCE) -> None:
        """Let the running job finish within ``patience`` seconds, else give it up; waiting people are not started."""
        self._closed = True
        if self._job and not self._job.done():
            await asyncio.wait([self._job], timeout=patience)
            if self._job.cancel():
                log.warning("stopped while %d people were personalized: ask for them again", len(self._running))

    async def _work(self) -> None:
        """Personalize the waiting people, and set their statuses."""
        while not self._closed and (running := self._next()):
            self._running = running
            for entry in running.values():
                entry.status = Status("running")
            people = [entry.person for entry in running.values() if entry.person]
            session = Session.joint(entry.session for entry in running.values())
            self._job = _in_thread(partial(self._statuses, people, session))
            del people
            await asyncio.wait([self._job])
            results = {} if self._job.cancelled() else self._job.result()
            for id, entry in running.items():
                if self._entries.get(id) is entry:  # neither forgotten nor put again meanwhile
                    entry.person = None
                    if id in results:
                        entry.status = results[id]
                    else:
                        del self._entries[id]
            self._running = {}
            finished = [id for id, entry in self._entries.items() if entry.status.state in ("done", "failed")]
            for id in finished[:-REMEMBERED]:  # the store shows the result for the others
                del self._entries[id]

    def _statuses(self, people: list[Person], session: Session) -> dict[str, Status]:
        """Personalize people; return each one's status, except for people who were forgotten meanwhile."""
        results = self._personalize(people, session)
        with suppress(MtaError):  # store unavailable: ``drop_forgotten`` follows later
            for id in session.forgotten(results):  # possibly after the state was saved
                del results[id]
        return results

    def _personalize(self, people: list[Person], session: Session) -> dict[str, Status]:
        done = None
        try:
            self._trainer = self._trainer or self._load()
            done = self._trainer.update(people, fewer=True, session=session)  # grown histories cost only the new items
        except Exception as error:
            if len(people) == 1 or not self._trainer:
                return {person.id: _failed(error) for person in people}
        if done is None:
            # One person's items must not fail the others. Outside of ``except``, the error no longer holds memory.
            return {id: status for person in people for id, status in self._personalize([person], session).items()}
        saved = [person.id for person in people if person.id not in done.forgotten]
        return {id: Status("done", _latest(session.store, id)) for id in saved} | {
            id: _failed(error) for id, error in done.failed.items()
        }


def _latest(store: Store, person: str) -> int | None:
    with suppress(MtaError):
        return store.latest(person)
    return None


def _in_thread(work: Callable[[], dict[str, Status]]) -> asyncio.Future[dict[str, Status]]:
    """Start ``work`` on one core, in a thread that does not keep the process alive; return its future result."""
    loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def settle(results: dict[str, Status]) -> None:
        if not future.done():
            future.set_result(results)

    def run() -> None:
        results = dict[str, Status]()
        compute_with(1)
        try:
            results = work()
        finally:
            with suppress(RuntimeError):  # the loop was closed after the job was given up
                loop.call_soon_threadsafe(settle, results)

    threading.Thread(target=run, name="mta-personalize", daemon=True).start()
    return future


def _failed(error: Exception) -> Status:
    """Return the status for an error, and log its type: its message may hold paths or ids."""
    log.warning("a person was not personalized: %s", type(error).__name__)
    if isinstance(error, InputError | Diverged) and not isinstance(error, PersonNotFound):
        return Status("failed", message=error.message)
    return Status("failed", message=public_message(error) if isinstance(error, MtaError) else type(error).__name__)
