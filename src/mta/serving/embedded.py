"""The embedded engine: transformers and our batched layer, one thread, rows of different people in every pass.

    waiting ──> filling ──> running ──> done            a row's way; the last two have a slot and a seat

One turn takes in who waits, pushes at most ``chunk`` prompt tokens of those who are filling through the model, then one
token of everybody who is running. So who runs is delayed by at most one chunk for each token, however long a newcomer's
prompt is.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from mta.bank.bank import Bank
from mta.base import BaseModel
from mta.errors import InputError, MtaError
from mta.machine import in_passing
from mta.serving.activated import Activated
from mta.serving.engine import Ask, EngineGone, Finish, Piece, QueueFull, Version
from mta.serving.sampling import Sampler
from mta.serving.seats import Person, Seats
from mta.serving.slots import Slots
from mta.store import Store

Told = Callable[[Piece | MtaError], None]


@dataclass(slots=True, eq=False)
class Row:
    """An answer on its way: the prompt tokens still to be pushed through, and what has been told of it."""

    ask: Ask
    person: Person
    tell: Told
    sampler: Sampler
    number: int = 0
    left: list[int] = field(default_factory=list)
    last: int = -1
    count: int = 0
    cached: int = 0
    cancelled: bool = False


class EmbeddedEngine:
    """Rows of different people from one base, in slots of one cache.

    ``slots`` rows run at once, ``waiting`` more may queue; a prompt and its answer have ``length`` tokens together.
    ``activated`` people are kept at hand.
    """

    def __init__(
        self,
        base: BaseModel,
        bank: Bank,
        store: Store,
        *,
        slots: int = 32,
        length: int | None = None,
        chunk: int = 64,
        waiting: int = 256,
        activated: int = 64,
    ) -> None:
        if not base.packable:
            raise InputError(f"{base.name!r} takes no positions: its rows cannot go on from slots of one cache")
        self.base, self.bank = base, bank
        self.length, self.chunk, self.waiting = length or base.prompts.max_tokens, chunk, waiting
        self.seats = in_passing(lambda: Seats(base, bank, slots))
        self.activated = Activated(self.seats, store, activated)
        self.slots = Slots(base, slots, self.length, chunk, self.seats.exchange)
        self._asked: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._queue: deque[Row] = deque()
        self._rows: list[Row] = []  # row n has slot n and seat n; those who run come first, then those who fill
        self._running = self._admitted = 0
        self._open = 0  # answers that somebody waits for
        self._closing = False
        self._stops = frozenset(base.stop_tokens)
        self._threads = torch.get_num_threads()
        self._reading = ThreadPoolExecutor(2, "mta-activate", initializer=lambda: torch.set_num_threads(1))
        self._thread = threading.Thread(target=self._work, name="mta-engine", daemon=True)
        self._thread.start()

    # -- from any thread -----------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether requests would be answered."""
        return self._thread.is_alive() and not self._closing

    async def answer(self, ask: Ask) -> AsyncIterator[Piece]:
        """The tokens of an answer as they come; closing the iterator gives the slot to the next.

        Raises InputError for a prompt that does not fit, PersonNotFound, QueueFull, EngineGone.
        """
        self._check(ask)
        self._open += 1
        try:
            loop, told = asyncio.get_running_loop(), asyncio.Queue[Piece | MtaError]()
            person = await loop.run_in_executor(self._reading, self.activated.get, ask.who)
            row = Row(ask, person, lambda piece: _tell(loop, told, piece), Sampler(ask))
            self._asked.put(lambda: self._queue.append(row))
            try:
                while True:
                    piece = await told.get()
                    if isinstance(piece, MtaError):
                        raise piece
                    yield piece
                    if piece.finish:
                        return
            finally:
                row.cancelled = True
        finally:
            self._open -= 1

    async def forget(self, person: str) -> None:
        """End what runs for a person, and drop all that was computed for them."""
        done = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def now() -> None:
            self.activated.forget(person)
            self._forget(lambda who: isinstance(who, Version) and who.person == person)
            loop.call_soon_threadsafe(done.set_result, None)

        self._asked.put(now)
        await done

    def facts(self) -> dict[str, tuple[float, str]]:
        """Rows, people at hand, and what the cache holds."""
        return {
            "running": (self._running, "Rows that get a token in each pass"),
            "filling": (len(self._rows) - self._running, "Rows whose prompt is being read"),
            "waiting": (len(self._queue), "Rows that wait for a slot"),
            "activated": (len(self.activated), "People whose adapters are at hand"),
            "activated_hits": (self.activated.hits, "Times somebody was at hand, since the start"),
            "merges": (self.activated.misses, "Times a merge was computed because they were not, since the start"),
            "cache_bytes": (self.slots.cache.nbytes, "Memory of keys and values"),
        }

    async def close(self) -> None:
        """Answer what is running and waiting, take nothing new, and stop."""
        self._closing = True
        self._asked.put(lambda: None)
        await asyncio.to_thread(self._thread.join)
        self._reading.shutdown()

    def _check(self, ask: Ask) -> None:
        if not ask.prompt:
            raise InputError("the prompt is empty")
        if len(ask.prompt) + ask.max_tokens > self.length:
            raise InputError(
                f"the prompt has {len(ask.prompt)} tokens and {ask.max_tokens} are to come, together more than "
                f"{self.length}",
                hint="Shorten it, or lower max_tokens.",
            )
        if not self.ready:
            raise EngineGone("the engine has stopped")
        if self._open >= len(self.slots) + self.waiting:
            raise QueueFull(f"{self.waiting} requests are waiting already", hint="Come again a little later.")

    # -- the engine's own thread ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _work(self) -> None:
        torch.set_num_threads(self._threads)  # this thread's own number: others settle for less
        try:
            while True:
                busy = bool(self._rows or self._queue)
                if self._closing and not busy and self._asked.empty():
                    return
                self._listen(wait=not busy)
                self._drop_cancelled()
                self._admit()
                if len(self._rows) > self._running:
                    self._fill()
                if self._running:
                    self._decode()
        except Exception as error:
            gone = EngineGone(f"the engine has stopped: {type(error).__name__}")
            for row in (*self._rows, *self._queue):
                row.tell(gone)
            raise
        finally:
            self._closing = True

    def _listen(self, wait: bool) -> None:
        while True:
            try:
                self._asked.get(block=wait)()
            except queue.Empty:
                return
            wait = False

    def _drop_cancelled(self) -> None:
        self._queue = deque(row for row in self._queue if not row.cancelled)
        for row in [row for row in self._rows if row.cancelled]:
            self._leave(row)

    def _admit(self) -> None:
        while self._queue and not self.slots.full:
            row = self._queue.popleft()
            place, row.cached = self.slots.take(row.ask.who, row.ask.prompt)
            self.seats.take(place, row.person)
            row.left = list(row.ask.prompt[row.cached :])
            self._admitted += 1
            row.number = self._admitted
            self._rows.append(row)

    def _fill(self) -> None:
        """Push prompt tokens of those who are filling: as many rows as share a chunk, first come, first served."""
        first = self._running
        oldest = min(range(first, len(self._rows)), key=lambda n: self._rows[n].number)
        self._exchange(first, oldest)
        rows, width = [self._rows[first]], min(len(self._rows[first].left), self.chunk)
        for row in self._rows[first + 1 :]:
            wider = max(width, min(len(row.left), self.chunk))
            if wider * (len(rows) + 1) > self.chunk:
                break
            rows, width = [*rows, row], wider
        logits = self._pass(slice(first, first + len(rows)), [row.left[:width] for row in rows])
        for row in rows:
            del row.left[:width]
        ready = [n for n, row in enumerate(rows) if not row.left]
        likeliest = logits.argmax(-1).tolist()
        for n in ready:
            self._start(rows[n])
        for n in ready:
            self._next(rows[n], logits[n], likeliest[n])

    def _decode(self) -> None:
        rows = self._rows[: self._running]
        logits = self._pass(slice(0, len(rows)), [[row.last] for row in rows])
        likeliest = logits.argmax(-1).tolist()
        for n, row in enumerate(rows):
            self._next(row, logits[n], likeliest[n])

    def _pass(self, rows: slice, tokens: list[list[int]]) -> Tensor:
        with self.seats.opened(rows):
            return self.slots.logits(rows, tokens)

    def _next(self, row: Row, logits: Tensor, likeliest: int) -> None:
        """One more token of an answer; who is done leaves."""
        token, finish = row.sampler.token(logits, likeliest), cast(Finish | None, None)
        if token.id in self._stops:
            finish = "stop"
        else:
            row.last, row.count = token.id, row.count + 1
            row.tell(Piece(token, cached=row.cached))
            if row.count >= row.ask.max_tokens:
                finish = "length"
        if finish:
            row.tell(Piece(finish=finish, cached=row.cached))
            self._leave(row)

    def _start(self, row: Row) -> None:
        """A row whose prompt is through goes over to those who run."""
        self._exchange(self._rows.index(row), self._running)
        self._running += 1

    def _leave(self, row: Row) -> None:
        place = self._rows.index(row)
        if place < self._running:  # the last one that runs takes its place, so that those who run stay together
            self._running -= 1
            self._exchange(place, self._running)
            place = self._running
        self.slots.leave(place)
        self._rows[place] = self._rows[-1]
        self._rows.pop()

    def _exchange(self, one: int, other: int) -> None:
        if one != other:
            self.slots.exchange(one, other)
            self._rows[one], self._rows[other] = self._rows[other], self._rows[one]

    def _forget(self, wanted: Callable[[Hashable], bool]) -> None:
        gone = EngineGone("the person was forgotten")
        for row in [row for row in (*self._rows, *self._queue) if wanted(row.ask.who)]:
            row.tell(gone)
            row.cancelled = True
        self._drop_cancelled()
        self.slots.forget(wanted)


def _tell(loop: asyncio.AbstractEventLoop, told: asyncio.Queue[Piece | MtaError], piece: Piece | MtaError) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(told.put_nowait, piece)
