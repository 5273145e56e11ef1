"""The embedded engine: a decoder in a thread of its own, and the door through which everybody else speaks to it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import torch

from mta.bank.bank import Bank
from mta.errors import MtaError
from mta.model.base import BaseModel
from mta.serving.embedded.adapter_cache import Activated
from mta.serving.embedded.adapter_slots import Seats
from mta.serving.embedded.kv_cache import refuse_unservable
from mta.serving.embedded.scheduler import Decoder, Row, Told
from mta.serving.engine import LATER, LOST, AnswerLost, Ask, EngineGone, Piece, QueueFull, Version
from mta.serving.sampling import Sampler
from mta.store import Store
from mta.system.device import compute_with, in_passing


class EmbeddedEngine:
    """Rows of different people from one base, in slots of one cache.

    ``slots`` rows run at once, ``waiting`` more may queue. A prompt and its answer have ``length`` tokens together,
    at most those that the base takes.
    ``activated`` people are kept at hand. The base's modules are the engine's alone while it lives. People whose state
    was made with the bank ``before`` this one are served with that until they are personalized anew.
    """

    def __init__(
        self,
        base: BaseModel,
        bank: Bank,
        store: Store,
        *,
        before: Bank | None = None,
        slots: int = 32,
        length: int | None = None,
        chunk: int = 128,
        waiting: int = 256,
        activated: int = 64,
    ) -> None:
        in_passing(lambda: refuse_unservable(base))
        self.base, self.bank = base, bank
        most = base.prompts.max_tokens
        self.length, self.waiting = min(length or most, most), waiting
        banks = [bank, before] if before else [bank]
        seats = in_passing(lambda: Seats(base, banks, slots))
        self.activated = Activated(seats, store, activated)
        self.decoder = Decoder(base, seats, slots, self.length, chunk)
        self._asked: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._open = 0  # answers that somebody waits for
        self._entering: set[asyncio.Event] = set()  # of requests whose person is looked up
        self._closing = False  # no request is taken
        self._complete = False  # and those that were taken before have been handed to the thread
        self._gone = False  # the thread takes nothing
        self.died = False
        self._door = threading.Lock()
        self._threads = torch.get_num_threads()
        self._reading = ThreadPoolExecutor(2, "mta-activate", initializer=lambda: compute_with(1))
        self._thread = threading.Thread(target=self._work, name="mta-engine", daemon=True)
        self._thread.start()

    # -- from any thread -----------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether requests would be answered."""
        return not self._closing and not self.decoder.stuck

    @property
    def alive(self) -> bool:
        """Whether it works, or was closed; false once its thread died, and while every step fails."""
        return not self.died and not self.decoder.stuck

    async def answer(self, ask: Ask) -> AsyncIterator[Piece]:
        """The tokens of an answer as they come; closing the iterator gives the slot to the next.

        Raises Refused for a prompt that does not fit, PersonNotFound, QueueFull, EngineGone.
        """
        self._check(ask)
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Piece | MtaError]()
        row: Row | None = None
        self._open += 1
        try:
            row = await self._entered(ask, lambda piece: _tell(loop, told, piece))
            while True:
                piece = await told.get()
                if isinstance(piece, MtaError):
                    raise piece
                yield piece
                if piece.finish:
                    return
        finally:
            self._open -= 1
            if row:
                row.cancelled = True

    async def forget(self, person: str) -> None:
        """End what runs for a person, and drop all that was computed for them."""

        def now() -> None:
            self.activated.forget(person)
            gone = EngineGone("the person was forgotten", hint="Ask the pooled model: task")
            self.decoder.end(gone, lambda who: isinstance(who, Version) and who.person == person)

        await self._in_turn(now)

    async def versions(self) -> set[Version]:
        """The versions of people of which something is in memory."""
        found = set[Version]()

        def now() -> None:
            known = (*self.activated.known(), *self.decoder.known())
            found.update(who for who in known if isinstance(who, Version))

        await self._in_turn(now)
        return found

    async def _in_turn(self, work: Callable[[], None]) -> None:
        """Let the engine's thread do something, and wait for it. Nothing is left to do where the engine has stopped."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def now() -> None:
            try:
                work()
            finally:
                _call_soon(loop, done.set)

        with suppress(EngineGone):  # with the engine everything that was computed is gone
            self._put(now)
            await done.wait()

    def facts(self) -> dict[str, tuple[float, str]]:
        """Rows, people at hand, and what the cache holds."""
        decoder = self.decoder
        return {
            "running": (decoder.running, "Rows that get a token in each pass"),
            "filling": (len(decoder.rows) - decoder.running, "Rows whose prompt is being read"),
            "waiting": (len(decoder.waiting), "Rows that wait for a slot"),
            "activated": (len(self.activated), "People whose adapters are at hand"),
            "activated_hits": (self.activated.hits, "Times somebody was at hand, since the start"),
            "merges": (self.activated.misses, "Times a merge was computed because they were not, since the start"),
            "cache_bytes": (decoder.slots.cache.nbytes, "Memory of keys and values"),
            "failed_steps": (decoder.failed, "Passes, admissions and merges that failed, since the start"),
            "lost": (decoder.lost, "Answers that such failures ended, since the start"),
        }

    async def close(self) -> None:
        """Answer what is running and waiting, take nothing new, and stop."""
        self._closing = True
        for entered in list(self._entering):
            await entered.wait()
        self._complete = True
        with suppress(EngineGone):
            self._put(lambda: None)
        await asyncio.to_thread(self._thread.join)
        self._reading.shutdown()

    async def _entered(self, ask: Ask, tell: Told) -> Row:
        """A row that waits for a slot, its person at hand. Raises what looking them up does, and AnswerLost."""
        since, entered = self.activated.forgotten, asyncio.Event()
        self._entering.add(entered)
        try:
            person = await asyncio.get_running_loop().run_in_executor(self._reading, self.activated.get, ask.who)
            row = Row(ask, person, tell, Sampler(ask))
            self._put(lambda: self._enter(row, since))
            return row
        except MtaError:
            raise
        except Exception as error:
            self._put(partial(self.decoder.note, error, lost=1))
            raise AnswerLost(LOST, hint=LATER) from None
        finally:
            self._entering.discard(entered)
            entered.set()

    def _check(self, ask: Ask) -> None:
        ask.check(self.length)
        if self._closing:
            raise EngineGone("the engine has stopped", hint=LATER)
        if self._open >= len(self.decoder.slots) + self.waiting:
            raise QueueFull(f"{self.waiting} requests are waiting already", hint="Come again a little later.")

    def _put(self, work: Callable[[], None]) -> None:
        """Let the engine's thread do something between two turns. Raises EngineGone."""
        with self._door:
            if self._gone:
                raise EngineGone("the engine has stopped", hint=LATER)
            self._asked.put(work)

    # -- the engine's own thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        compute_with(self._threads)
        try:
            while self.decoder.busy or not self._complete or not self._asked.empty():
                self._listen(wait=not self.decoder.busy)
                self.decoder.turn()
        except BaseException:
            self.died = True  # before its requests are answered: health must not say otherwise after that
            raise
        finally:
            self._closing = True
            with self._door:
                self._gone = True
            self._listen(wait=False)  # whoever came in before the door was shut
            self.decoder.end(EngineGone("the engine has stopped", hint=LATER))

    def _listen(self, wait: bool) -> None:
        while True:
            try:
                work = self._asked.get(block=wait)
            except queue.Empty:
                return
            work()
            wait = False

    def _enter(self, row: Row, since: int) -> None:
        """A row joins those who wait; if anybody was forgotten while its person was looked up, that is done again."""
        if since != self.activated.forgotten:
            try:
                row.person = self.activated.get(row.ask.who)
            except MtaError as gone:
                return row.tell(gone)
            except Exception as error:
                return self.decoder.fail([row], error)
        self.decoder.waiting.append(row)


def _tell(loop: asyncio.AbstractEventLoop, told: asyncio.Queue[Piece | MtaError], piece: Piece | MtaError) -> None:
    _call_soon(loop, lambda: told.put_nowait(piece))


def _call_soon(loop: asyncio.AbstractEventLoop, work: Callable[[], object]) -> None:
    """Let the caller's event loop do something; nothing happens if that loop is closed."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(work)
