"""Background personalization (stages 2 and 3): waiting people are personalized in batches, in one thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from mta.data.history import Person
from mta.errors import InputError, MtaError
from mta.personalize import Personalizer
from mta.personalize.forgetting import Forgotten
from mta.serving.api.auth import LOCAL, Key
from mta.serving.engine import QueueFull
from mta.store.tombstones import NOTHING
from mta.system.device import compute_with

TOGETHER = 32  # people per job
REMEMBERED = 4096  # finished people whose status is still reported


@dataclass(frozen=True, slots=True)
class Status:
    """Progress of a person's personalization; ``version`` is set when done."""

    state: Literal["waiting", "running", "done", "failed"]
    version: int | None = None
    message: str = ""


class Jobs:
    """Queue of at most ``most`` people waiting for personalization, and the job that runs.

    The personalizer works on its own modules (``BaseModel.twin``) and on one core, so that answers continue meanwhile.
    If the base of ``personal`` has no weights, ``load`` returns the personalizer that trains, before the first job.
    """

    def __init__(self, personal: Personalizer, most: int = 256, load: Callable[[], Personalizer] | None = None) -> None:
        self.personal, self.most = personal, most
        self._load, self._trainer = load or (lambda: personal), None if load else personal
        self._waiting: dict[str, Person] = {}
        self._share: dict[str, str] = {}  # share of the key that put each waiting person; "" is the operator
        self._running: dict[str, Person] = {}
        self._status: dict[str, Status] = {}
        self._since: dict[str, frozenset[str]] = {}  # each person's tombstones when put() was called
        self._changed = threading.Condition()
        self._forgetting = 0
        self._closed = False
        self._forgetters = ThreadPoolExecutor(4, "mta-forget")  # own threads: they wait for a job to end
        self._thread = threading.Thread(target=self._run, name="mta-personalize", daemon=True)
        self._thread.start()

    def put(self, person: Person, key: Key = LOCAL, since: frozenset[str] = NOTHING) -> Status:
        """Queue a person for personalization; a person already waiting gets the new items.

        ``since`` are the person's tombstones from before the items were read. Raises QueueFull: one prefix key's people
        fill at most a quarter of the queue, all prefix keys' people three quarters.
        """
        with self._changed:
            if person.id not in self._waiting and self._full(key.share):
                raise QueueFull("too many people are waiting to be personalized", hint="Retry later.")
            self._waiting[person.id] = person
            self._share[person.id] = key.share
            self._status[person.id], self._since[person.id] = Status("waiting"), since
            self._changed.notify_all()
            return self._status[person.id]

    def _full(self, share: str) -> bool:
        waiting = Counter(self._share[id] for id in self._waiting)
        share_full = waiting[share] >= self.most // 4 or waiting.total() - waiting[""] >= self.most * 3 // 4
        return len(self._waiting) >= self.most or (bool(share) and share_full)

    def status(self, person: str) -> Status | None:
        """Return a person's progress, or None if nothing was requested since the server started."""
        return self._status.get(person)

    async def forget(self, person: str) -> Forgotten:
        """Remove a person from the queue, wait for the running job, and delete everything stored about the person.

        No other job starts until then. The caller must not put the same id meanwhile.
        """
        return await asyncio.get_running_loop().run_in_executor(self._forgetters, self._forget, person)

    def _forget(self, person: str) -> Forgotten:
        with self._changed:
            self._drop(person)
            self._forgetting += 1
            self._changed.wait_for(lambda: not self._running)  # its checkpoints are deleted too
        try:
            return self.personal.forget(person, keep_exports=True)
        finally:
            with self._changed:
                self._drop(person)
                self._forgetting -= 1
                self._changed.notify_all()

    def drop_forgotten(self, names: Collection[str]) -> None:
        """Drop waiting people and statuses that are older than tombstones of these ``names``.

        For running people, ``Personalizer.personalize`` saves nothing and no status is set.
        """
        store = self.personal.store
        with self._changed:
            for id in list(self._status) if store else ():
                if store and not store.tombstones.among(names, id) <= self._since.get(id, NOTHING):
                    self._drop(id)

    def _drop(self, person: str) -> None:
        """Remove a person's queue entry and status."""
        self._waiting.pop(person, None)
        self._share.pop(person, None)
        self._status.pop(person, None)
        self._since.pop(person, None)

    async def close(self) -> None:
        """Let the running job finish; waiting people are not started."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._forgetters.shutdown)

    def _run(self) -> None:
        compute_with(1)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: (self._waiting and not self._forgetting) or self._closed)
                if self._closed:
                    return
                chosen = list(self._waiting)[:TOGETHER]
                self._running = {id: self._waiting.pop(id) for id in chosen}
                for id in chosen:
                    del self._share[id]
                self._status |= dict.fromkeys(chosen, Status("running"))
                since = NOTHING.union(*(self._since[id] for id in chosen))
            results = self._personalize(list(self._running.values()), since)
            forgotten = self._forgotten(results, since)
            with self._changed:
                for id in set(self._running) - set(self._waiting):
                    if id in results and id not in forgotten and id in self._status:
                        self._status[id] = results[id]
                    else:  # forgotten meanwhile
                        self._drop(id)
                self._running = {}
                self._drop_old()
                self._changed.notify_all()

    def _drop_old(self) -> None:
        """Keep the statuses of the last ``REMEMBERED`` people only; the store shows the result for the others."""
        for id in list(self._status)[:-REMEMBERED]:
            if self._status[id].state in ("done", "failed"):
                self._drop(id)

    def _personalize(self, people: list[Person], since: frozenset[str]) -> dict[str, Status]:
        """Return each person's status, except for people forgotten after the tombstones ``since``."""
        try:
            self._trainer = self._trainer or self._load()
            done = self._trainer.personalize(people, since=since)
        except Exception as error:
            if len(people) > 1 and self._trainer:  # one person's items must not fail the others
                return {id: status for person in people for id, status in self._personalize([person], since).items()}
            message = error.message if isinstance(error, InputError) else type(error).__name__
            return {person.id: Status("failed", message=message) for person in people}  # without paths of states
        diverged = dict.fromkeys(done.failed, Status("failed", message="training diverged"))
        ids = [person.id for person in people if person.id not in done.forgotten]
        return {id: Status("done", self._latest(id)) for id in ids} | diverged

    def _forgotten(self, people: Collection[str], since: frozenset[str]) -> set[str]:
        """Return people forgotten after the tombstones ``since``, possibly after their state was saved."""
        store = self.personal.store
        with contextlib.suppress(MtaError):  # store unavailable: ``drop_forgotten`` follows later
            return store.tombstones.since(people, since) if store else set()
        return set()

    def _latest(self, person: str) -> int | None:
        with contextlib.suppress(MtaError):
            return self.personal.store.latest(person) if self.personal.store else None
        return None
