"""Stages 2 and 3 in the background: whoever is asked for is personalized together, in a thread of its own."""

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

TOGETHER = 32  # people of one job
REMEMBERED = 4096  # people whose status is told after they are done


@dataclass(frozen=True, slots=True)
class Status:
    """How far a person's personalizing is; ``version`` is there when it is done."""

    state: Literal["waiting", "running", "done", "failed"]
    version: int | None = None
    message: str = ""


class Jobs:
    """People waiting to be personalized, and those who are. At most ``most`` wait.

    The personalizer works on modules of its own (``BaseModel.twin``), on one core, so that answers go on meanwhile.
    If ``personal`` is over an outline, ``load`` returns the one that trains; it is called for the first job.
    """

    def __init__(self, personal: Personalizer, most: int = 256, load: Callable[[], Personalizer] | None = None) -> None:
        self.personal, self.most = personal, most
        self._load, self._trains = load or (lambda: personal), None if load else personal
        self._waiting: dict[str, Person] = {}
        self._whose: dict[str, str] = {}  # by whose key they wait: "" is the operator's
        self._running: dict[str, Person] = {}
        self._status: dict[str, Status] = {}
        self._since: dict[str, frozenset[str]] = {}  # a person's tombstones when the person was put
        self._turn = threading.Condition()
        self._forgetting = 0
        self._closed = False
        self._forgetters = ThreadPoolExecutor(4, "mta-forget")  # they wait for a job to end, and must keep nobody else
        self._thread = threading.Thread(target=self._work, name="mta-personalize", daemon=True)
        self._thread.start()

    def put(self, person: Person, key: Key = LOCAL, since: frozenset[str] = NOTHING) -> Status:
        """Personalize a person of these items; whoever waits already is personalized of the newer ones.

        ``since`` are the person's tombstones that were there before the items were looked up.
        Raises QueueFull where too many wait: a prefix's people fill a quarter of the queue at most, those of all
        prefixes three quarters.
        """
        with self._turn:
            if person.id not in self._waiting and self._full(key.share):
                raise QueueFull("too many people wait to be personalized", hint="Come again later.")
            self._waiting[person.id] = person
            self._whose[person.id] = key.share
            self._status[person.id], self._since[person.id] = Status("waiting"), since
            self._turn.notify_all()
            return self._status[person.id]

    def _full(self, whose: str) -> bool:
        of = Counter(self._whose[id] for id in self._waiting)
        theirs = of[whose] >= self.most // 4 or of.total() - of[""] >= self.most * 3 // 4
        return len(self._waiting) >= self.most or (bool(whose) and theirs)

    def status(self, person: str) -> Status | None:
        """How far it is, or None where nothing was asked for since the server began."""
        return self._status.get(person)

    async def forget(self, person: str) -> Forgotten:
        """Drop what waits for a person, let the running job end, and remove all that is kept of them.

        Until it is done no other job begins, and whoever calls must put nobody of that id.
        """
        return await asyncio.get_running_loop().run_in_executor(self._forgetters, self._forget, person)

    def _forget(self, person: str) -> Forgotten:
        with self._turn:
            self._drop(person)
            self._forgetting += 1
            self._turn.wait_for(lambda: not self._running)  # what it leaves for going on is removed too
        try:
            return self.personal.forget(person, keep_exports=True)
        finally:
            with self._turn:
                self._drop(person)
                self._forgetting -= 1
                self._turn.notify_all()

    def drop_forgotten(self, names: Collection[str]) -> None:
        """Drop whoever waits, and anybody's status, that tombstones of these ``names`` are newer than.

        Nothing is saved of those who are running (``Personalizer.personalize``), and no status is set of them.
        """
        store = self.personal.store
        with self._turn:
            for id in list(self._status) if store else ():
                if store and not store.tombstones.among(names, id) <= self._since.get(id, NOTHING):
                    self._drop(id)

    def _drop(self, person: str) -> None:
        """Remove a person from the queue, and their status."""
        self._waiting.pop(person, None)
        self._whose.pop(person, None)
        self._status.pop(person, None)
        self._since.pop(person, None)

    async def close(self) -> None:
        """Let the running job end; who waits is not begun."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._forgetters.shutdown)

    def _work(self) -> None:
        compute_with(1)
        while True:
            with self._turn:
                self._turn.wait_for(lambda: (self._waiting and not self._forgetting) or self._closed)
                if self._closed:
                    return
                chosen = list(self._waiting)[:TOGETHER]
                self._running = {id: self._waiting.pop(id) for id in chosen}
                for id in chosen:
                    del self._whose[id]
                self._status |= dict.fromkeys(chosen, Status("running"))
                since = NOTHING.union(*(self._since[id] for id in chosen))
            found = self._personalized(list(self._running.values()), since)
            gone = self._forgotten(found, since)
            with self._turn:
                for id in set(self._running) - set(self._waiting):
                    if id in found and id not in gone and id in self._status:
                        self._status[id] = found[id]
                    else:  # forgotten meanwhile
                        self._drop(id)
                self._running = {}
                self._drop_old()
                self._turn.notify_all()

    def _drop_old(self) -> None:
        """Of those who are done only the last ones are remembered; what is kept of the others says as much."""
        for id in list(self._status)[:-REMEMBERED]:
            if self._status[id].state in ("done", "failed"):
                self._drop(id)

    def _personalized(self, people: list[Person], since: frozenset[str]) -> dict[str, Status]:
        """The status of each, but of those who were forgotten after the tombstones ``since``."""
        try:
            self._trains = self._trains or self._load()
            done = self._trains.personalize(people, since=since)
        except Exception as error:
            if len(people) > 1 and self._trains:  # one person's items must not be everybody's failure
                return {id: status for one in people for id, status in self._personalized([one], since).items()}
            told = error.message if isinstance(error, InputError) else type(error).__name__
            return {one.id: Status("failed", message=told) for one in people}  # where states lie is nobody's business
        diverged = dict.fromkeys(done.failed, Status("failed", message="training led to numbers that are not finite"))
        here = [person.id for person in people if person.id not in done.forgotten]
        return {id: Status("done", self._latest(id)) for id in here} | diverged

    def _forgotten(self, people: Collection[str], since: frozenset[str]) -> set[str]:
        """Those who were forgotten after the tombstones ``since``, perhaps after their state was saved."""
        store = self.personal.store
        with contextlib.suppress(MtaError):  # a store that does not answer: ``drop_forgotten`` comes later
            return store.tombstones.since(people, since) if store else set()
        return set()

    def _latest(self, person: str) -> int | None:
        with contextlib.suppress(MtaError):
            return self.personal.store.latest(person) if self.personal.store else None
        return None
