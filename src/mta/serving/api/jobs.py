"""Background personalization (stages 2 and 3): waiting people are personalized in batches, in one thread.

A state is updated if the history is the earlier one with new items (``mta.personalize.update``); otherwise it is made
anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

from mta.data.history import Person
from mta.errors import MtaError
from mta.personalize import Personalizer
from mta.personalize.forgetting import Forgotten
from mta.serving.api.auth import LOCAL, Key
from mta.serving.api.errors import public_message
from mta.serving.api.histories import ROOM, size_of
from mta.serving.api.limits import Shares
from mta.serving.engine import QueueFull
from mta.store import Session
from mta.store.tombstones import NOTHING
from mta.system.device import compute_with

log = logging.getLogger("mta")
TOGETHER, ITEMS = 32, 256  # people, and their items, per job: forgetting and other keys' people wait for one
REMEMBERED = 4096  # finished people whose status is still reported
_AHEAD = "meanwhile another process made the person's model from more items: append these first"
_PATIENCE = 20.0  # seconds that a running job has once the gateway stops


@dataclass(frozen=True, slots=True)
class Status:
    """Progress of a person's personalization; ``version`` is set when done."""

    state: Literal["waiting", "running", "done", "failed"]
    version: int | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A person's place in the queue, and later the result, without ``person``."""

    person: Person | None
    share: str  # of the key that put the person; "" is the operator
    since: frozenset[str]  # the person's tombstones from before the items were read
    size: int = 0  # bytes of the items
    fewer: bool = False  # whether the new state may replace one of more items
    status: Status = Status("waiting")


class Jobs:
    """Queue of at most ``most`` people waiting for personalization, and the job that runs.

    The personalizer works on its own modules (``BaseModel.twin``) and on one core, so that answers continue meanwhile.
    If the base of ``personal`` has no weights, ``load`` returns the personalizer that trains, before the first job.
    """

    def __init__(self, personal: Personalizer, most: int = 256, load: Callable[[], Personalizer] | None = None) -> None:
        self.personal, self.most = personal, most
        self._load, self._trainer = load or (lambda: personal), None if load else personal
        self._entries: dict[str, _Entry] = {}  # by person, in the order of the queue
        self._running: dict[str, _Entry] = {}
        self._changed = threading.Condition()
        self._closed = self._abandoned = False
        self._forgetters = ThreadPoolExecutor(TOGETHER + 4, "mta-forget")  # a job's people wait in them for its end
        self._thread = threading.Thread(target=self._run, name="mta-personalize", daemon=True)
        self._thread.start()

    def put(self, person: Person, key: Key = LOCAL, since: frozenset[str] = NOTHING, fewer: bool = False) -> Status:
        """Queue a person for personalization; a person already waiting gets the new items.

        Only with ``fewer``, the state may replace one that was made from more items.
        ``since`` are the person's tombstones from before the items were read. Raises QueueFull if the key's share of
        the queue, or of the memory for items, is full (``Shares``).
        """
        size = size_of(person)
        with self._changed:
            if self._full(person.id, key.share, size):
                raise QueueFull("too many people are waiting to be personalized", hint="Retry later.")
            if person.id not in self._waiting():
                self._entries.pop(person.id, None)  # a new entry goes to the end of the queue
            entry = self._entries[person.id] = _Entry(person, key.share, since, size, fewer)
            self._changed.notify_all()
            return entry.status

    def _waiting(self) -> dict[str, _Entry]:
        return {id: entry for id, entry in self._entries.items() if entry.status.state == "waiting"}

    def _full(self, person: str, share: str, size: int) -> bool:
        """Return whether there is no place for a person, who may wait already, with items of so many bytes."""
        places, memory = Shares(self.most), Shares(ROOM)
        for id, entry in self._waiting().items():
            if id != person:
                places.add(entry.share, 1)
                memory.add(entry.share, entry.size)
        return not (places.fits(share, 1) and memory.fits(share, size))

    def _next(self) -> dict[str, _Entry]:
        """Return who is personalized now: the keys' first people in turn, as many as fit into a job, at least one."""
        turns, ranked = Counter[str](), list[tuple[int, str, _Entry]]()
        for id, entry in self._waiting().items():
            ranked.append((turns[entry.share], id, entry))
            turns[entry.share] += 1
        chosen, items = dict[str, _Entry](), 0
        for _, id, entry in sorted(ranked, key=lambda one: one[0]):
            items += len(entry.person.items) if entry.person else 0
            if chosen and (items > ITEMS or len(chosen) == TOGETHER):
                break
            chosen[id] = entry
        return chosen

    def status(self, person: str, tombstones: frozenset[str] = frozenset()) -> Status | None:
        """Return a person's progress, or None if nothing was requested since the server started or the forgetting.

        ``tombstones`` are the person's.
        """
        entry = self._entries.get(person)
        return entry.status if entry and tombstones <= entry.since else None

    async def forget(self, person: str) -> Forgotten:
        """Remove a person from the queue, and delete everything stored about the person.

        Waits for the running job if the person is in it. The caller must not put or forget the same id meanwhile.
        """
        return await asyncio.get_running_loop().run_in_executor(self._forgetters, self._forget, person)

    def _forget(self, person: str) -> Forgotten:
        with self._changed:
            self._entries.pop(person, None)
        try:
            found = self.personal.forget(person, keep_exports=True)  # from its tombstone on, nothing new is saved
            with self._changed:
                is_running = person in self._running
                self._changed.wait_for(lambda: person not in self._running or self._abandoned)
            if is_running:
                self.personal.forget(person, keep_exports=True)  # what the job was writing at that moment
            return found
        finally:
            with self._changed:
                self._entries.pop(person, None)

    def drop_forgotten(self) -> None:
        """Drop waiting people and statuses that are older than a tombstone.

        For running people, ``Personalizer.update`` saves nothing and no status is set.
        """
        if not (store := self.personal.store):
            return
        with self._changed:
            before = dict(self._entries)
        tombstones = store.tombstones.of_each(before)  # may take seconds: nothing waits for it
        with self._changed:
            for id, entry in before.items():
                now = self._entries.get(id)
                if now and now.since is entry.since and not tombstones[id] <= entry.since:  # else it was put again
                    del self._entries[id]

    async def close(self, patience: float = _PATIENCE) -> None:
        """Let the running job finish within ``patience`` seconds, else give it up; waiting people are not started."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        await asyncio.to_thread(self._thread.join, patience)
        if self._thread.is_alive():
            log.warning("stopped while %d people were personalized: ask for them again", len(self._running))
            with self._changed:
                self._abandoned = True
                self._changed.notify_all()
        await asyncio.to_thread(self._forgetters.shutdown)

    def _run(self) -> None:
        compute_with(1)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting() or self._closed)
                if self._closed:
                    return
                self._running = {id: replace(one, status=Status("running")) for id, one in self._next().items()}
                self._entries |= self._running
            self._run_job()

    def _run_job(self) -> None:
        """Personalize the running people, and set their statuses."""
        since = NOTHING.union(*(entry.since for entry in self._running.values()))
        results, store = dict[str, Status](), self.personal.store
        for fewer in (False, True):
            people = [one.person for one in self._running.values() if one.person and one.fewer == fewer]
            results |= self._personalize(people, since, fewer) if people else {}
        forgotten: Collection[str] = ()  # possibly after the state was saved
        with contextlib.suppress(MtaError):  # store unavailable: ``drop_forgotten`` follows later
            forgotten = store.tombstones.since(results, since) if store else ()
        with self._changed:
            for id, entry in self._running.items():
                if self._entries.get(id) is not entry:  # forgotten or put again meanwhile
                    continue
                if id in results and id not in forgotten:
                    self._entries[id] = replace(entry, person=None, status=results[id])
                else:
                    del self._entries[id]
            self._running = {}
            finished = [id for id, entry in self._entries.items() if entry.status.state in ("done", "failed")]
            for id in finished[:-REMEMBERED]:  # the store shows the result for the others
                del self._entries[id]
            self._changed.notify_all()

    def _personalize(self, people: list[Person], since: frozenset[str], fewer: bool) -> dict[str, Status]:
        """Return each person's status, except for people forgotten after the tombstones ``since``."""
        done = None
        try:
            self._trainer = self._trainer or self._load()
            session = Session(self._trainer.store, since) if self._trainer.store else None
            done = self._trainer.update(people, fewer=fewer, session=session)  # grown histories cost only the new items
        except Exception as error:
            if len(people) == 1 or not self._trainer:
                return {person.id: _failed(error) for person in people}
        if done is None:
            # One person's items must not fail the others. Outside of ``except``, the error no longer holds memory.
            each = [self._personalize([person], since, fewer) for person in people]
            return {id: status for one in each for id, status in one.items()}
        done_ids = [person.id for person in people if person.id not in done.forgotten]
        failed = {id: _failed(error) for id, error in done.failed.items()}
        failed |= {id: Status("failed", message=_AHEAD) for id in done.ahead}
        return {id: Status("done", self._latest(id)) for id in done_ids} | failed

    def _latest(self, person: str) -> int | None:
        with contextlib.suppress(MtaError):
            return self.personal.store.latest(person) if self.personal.store else None
        return None


def _failed(error: Exception) -> Status:
    """Return the status for an error, and log its type: its message may hold paths or ids."""
    log.warning("a person was not personalized: %s", type(error).__name__)
    message = public_message(error, hint=False) if isinstance(error, MtaError) else type(error).__name__
    return Status("failed", message=message)
