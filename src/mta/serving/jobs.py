"""Stages 2 and 3 in the background: whoever is asked for is personalized together, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from mta.errors import InputError, MtaError
from mta.history import Person
from mta.personalize import Forgotten, Personalizer

TOGETHER = 32  # people of one job


@dataclass(frozen=True, slots=True)
class Status:
    """How far a person's personalizing is; ``version`` is there when it is done."""

    state: Literal["waiting", "running", "done", "failed"]
    version: int | None = None
    message: str = ""


class Jobs:
    """People waiting to be personalized, and those who are. At most ``most`` wait.

    The personalizer works on modules of its own (``BaseModel.twin``), on one core, so that answers go on meanwhile.
    """

    def __init__(
        self, personal: Personalizer, changed: Callable[[str], None] = lambda _: None, most: int = 256
    ) -> None:
        self.personal, self.most = personal, most
        self._changed = changed
        self._waiting: dict[str, Person] = {}
        self._running: dict[str, Person] = {}
        self._status: dict[str, Status] = {}
        self._turn = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="mta-personalize", daemon=True)
        self._thread.start()

    def put(self, person: Person) -> Status:
        """Personalize a person of these items; whoever waits already is personalized of the newer ones.

        Raises InputError where too many wait.
        """
        with self._turn:
            if len(self._waiting) >= self.most and person.id not in self._waiting:
                raise InputError("too many people wait to be personalized", hint="Come again later.")
            self._waiting[person.id] = person
            self._status[person.id] = Status("waiting")
            self._turn.notify_all()
            return self._status[person.id]

    def status(self, person: str) -> Status | None:
        """How far it is, or None where nothing was asked for since the server began."""
        return self._status.get(person)

    def forget(self, person: str) -> Forgotten:
        """Drop what waits for a person, let the running job end, and remove all that is kept of them."""
        with self._turn:
            self._waiting.pop(person, None)
            self._turn.wait_for(lambda: not self._running)  # what it leaves for going on is removed too
            found = self.personal.forget(person)
            self._status.pop(person, None)
            return found

    async def close(self) -> None:
        """Let the running job end; who waits is not begun."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        torch.set_num_threads(1)  # of this thread alone
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                chosen = list(self._waiting)[:TOGETHER]
                self._running = {id: self._waiting.pop(id) for id in chosen}
                self._status |= dict.fromkeys(chosen, Status("running"))
            found = self._personalized(list(self._running.values()))
            with self._turn:
                self._status |= {id: status for id, status in found.items() if id not in self._waiting}
                self._running = {}
                self._turn.notify_all()
            for id in found:
                self._changed(id)

    def _personalized(self, people: list[Person]) -> dict[str, Status]:
        try:
            self.personal.personalize(people)
        except Exception as error:
            if len(people) > 1:  # one person's items must not be everybody's failure
                return {id: status for one in people for id, status in self._personalized([one]).items()}
            told = error.message if isinstance(error, MtaError) else type(error).__name__
            return {people[0].id: Status("failed", message=told)}
        store, done = self.personal.store, {}
        for person in people:
            with contextlib.suppress(MtaError):
                done[person.id] = Status("done", store.latest(person.id) if store else None)
        return done
