"""The embedded engine: a scheduler in its own thread, and the asynchronous interface to it."""

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
from mta.serving.embedded.adapter_cache import AdapterCache
from mta.serving.embedded.adapter_slots import AdapterSlots
from mta.serving.embedded.kv_cache import refuse_unservable
from mta.serving.embedded.scheduler import Row, Scheduler, Send
from mta.serving.engine import LATER, LOST, AnswerLost, Ask, EngineGone, Piece, QueueFull, Version
from mta.serving.sampling import Sampler
from mta.store import Store
from mta.system.device import compute_with, in_passing


class EmbeddedEngine:
    """Serves rows of different people from one base, with one batch and one KV cache.

    At most ``slots`` rows run at once and ``waiting`` more are queued. A prompt and its answer have at most ``length``
    tokens together, never more than the base accepts. ``activated`` is the size of the adapter cache. While the engine
    lives, only the engine may use the base's modules. People whose state was made with the bank ``before`` are served
    with that bank until they are personalized again.
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
        limit = base.prompts.max_tokens
        self.length, self.waiting = min(length or limit, limit), waiting
        banks = [bank, before] if before else [bank]
        adapters = in_passing(lambda: AdapterSlots(base, banks, slots))
        self.activated = AdapterCache(adapters, store, activated)
        self.scheduler = Scheduler(base, adapters, slots, self.length, chunk)
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._open = 0  # answers with a waiting caller
        self._entering: set[asyncio.Event] = set()  # requests that load their adapter
        self._closing = False  # no new request is accepted
        self._complete = False  # and all accepted requests were passed to the thread
        self._gone = False  # the thread accepts no calls
        self.died = False
        self._lock = threading.Lock()
        self._threads = torch.get_num_threads()
        self._loaders = ThreadPoolExecutor(2, "mta-activate", initializer=lambda: compute_with(1))
        self._thread = threading.Thread(target=self._run, name="mta-engine", daemon=True)
        self._thread.start()

    # -- from any thread -----------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether requests would be answered now."""
        return not self._closing and not self.scheduler.stuck

    @property
    def alive(self) -> bool:
        """False if the thread died, and while every step fails; true after ``close``."""
        return not self.died and not self.scheduler.stuck

    async def answer(self, ask: Ask) -> AsyncIterator[Piece]:
        """Stream the tokens of an answer; closing the iterator frees the slot.

        Raises Refused for a prompt that does not fit, PersonNotFound, QueueFull, EngineGone.
        """
        self._check(ask)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece | MtaError]()
        row: Row | None = None
        self._open += 1
        try:
            row = await self._enqueue(ask, lambda piece: _call_soon(loop, partial(pieces.put_nowait, piece)))
            while True:
                piece = await pieces.get()
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
        """End the person's running answers, and drop everything computed for the person."""

        def work() -> None:
            self.activated.forget(person)
            error = EngineGone("the person was forgotten", hint="Ask the pooled model: task")
            self.scheduler.end(error, lambda who: isinstance(who, Version) and who.person == person)

        await self._in_thread(work)

    async def versions(self) -> set[Version]:
        """Return the person versions in memory: rows, warm slots, and cached adapters."""
        found = set[Version]()

        def work() -> None:
            known = (*self.activated.known(), *self.scheduler.known())
            found.update(who for who in known if isinstance(who, Version))

        await self._in_thread(work)
        return found

    async def _in_thread(self, call: Callable[[], None]) -> None:
        """Run a call in the engine's thread and wait for it; do nothing if the engine has stopped."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def work() -> None:
            try:
                call()
            finally:
                _call_soon(loop, done.set)

        with suppress(EngineGone):  # a stopped engine holds nothing in memory
            self._put(work)
            await done.wait()

    def facts(self) -> dict[str, tuple[float, str]]:
        """Return metrics of rows, adapter cache, and KV cache."""
        scheduler = self.scheduler
        return {
            "running": (scheduler.running, "Rows that are generating tokens"),
            "filling": (len(scheduler.rows) - scheduler.running, "Rows in prefill"),
            "waiting": (len(scheduler.waiting), "Rows waiting for a slot"),
            "activated": (len(self.activated), "Adapters in the adapter cache"),
            "activated_hits": (self.activated.hits, "Adapter cache hits since the start"),
            "merges": (self.activated.misses, "Adapter cache misses since the start; each computes a merge"),
            "cache_bytes": (scheduler.slots.cache.nbytes, "Bytes of the KV cache"),
            "failed_steps": (scheduler.failed, "Failed passes, admissions, and merges since the start"),
            "lost": (scheduler.lost, "Answers ended by such failures since the start"),
        }

    async def close(self) -> None:
        """Finish running and waiting requests, accept no new ones, and stop."""
        self._closing = True
        for entered in list(self._entering):
            await entered.wait()
        self._complete = True
        with suppress(EngineGone):
            self._put(lambda: None)
        await asyncio.to_thread(self._thread.join)
        self._loaders.shutdown()

    async def _enqueue(self, ask: Ask, send: Send) -> Row:
        """Load the adapter and queue a row. Raises AnswerLost and what loading the adapter raises."""
        since, entered = self.activated.forgotten, asyncio.Event()
        self._entering.add(entered)
        try:
            adapter = await asyncio.get_running_loop().run_in_executor(self._loaders, self.activated.get, ask.who)
            row = Row(ask, adapter, send, Sampler(ask))
            self._put(lambda: self._enter(row, since))
            return row
        except MtaError:
            raise
        except Exception as error:
            self._put(partial(self.scheduler.note, error, lost=1))
            raise AnswerLost(LOST, hint=LATER) from None
        finally:
            self._entering.discard(entered)
            entered.set()

    def _check(self, ask: Ask) -> None:
        ask.check(self.length)
        if self._closing:
            raise EngineGone("the engine has stopped", hint=LATER)
        if self._open >= len(self.scheduler.slots) + self.waiting:
            raise QueueFull(f"{self.waiting} requests are waiting already", hint="Retry a little later.")

    def _put(self, call: Callable[[], None]) -> None:
        """Queue a call for the engine's thread, which runs it between two steps. Raises EngineGone."""
        with self._lock:
            if self._gone:
                raise EngineGone("the engine has stopped", hint=LATER)
            self._calls.put(call)

    # -- the engine's own thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        compute_with(self._threads)
        try:
            while self.scheduler.busy or not self._complete or not self._calls.empty():
                self._run_calls(wait=not self.scheduler.busy)
                self.scheduler.step()
        except BaseException:
            self.died = True  # before requests get their errors: a health check after an error must see it
            raise
        finally:
            self._closing = True
            with self._lock:
                self._gone = True
            self._run_calls(wait=False)  # calls queued before the engine was marked gone
            self.scheduler.end(EngineGone("the engine has stopped", hint=LATER))

    def _run_calls(self, wait: bool) -> None:
        while True:
            try:
                call = self._calls.get(block=wait)
            except queue.Empty:
                return
            call()
            wait = False

    def _enter(self, row: Row, since: int) -> None:
        """Queue a row. If anyone was forgotten while its adapter was loaded, load the adapter again first."""
        if since != self.activated.forgotten:
            try:
                row.adapter = self.activated.get(row.ask.who)
            except MtaError as error:
                return row.send(error)
            except Exception as error:
                return self.scheduler.fail([row], error)
        self.scheduler.waiting.append(row)


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    """Run a call in the caller's event loop; do nothing if the loop is closed."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
