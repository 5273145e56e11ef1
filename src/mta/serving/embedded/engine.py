"""The embedded engine: a scheduler in its own thread, and the asynchronous interface to it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain

import torch

from mta.bank.bank import Bank
from mta.errors import MtaError
from mta.model.base import BaseModel
from mta.personalize.adapters import SharedModel
from mta.serving.embedded.adapter_slots import AdapterSlots, RowAdapter
from mta.serving.embedded.kv_cache import refuse_unservable
from mta.serving.embedded.scheduler import AnswerRow, Sampler, Scheduler
from mta.serving.engine import LATER, QUEUED, Engine, EngineGone, EngineRequest, Pieces, ServedModel, Version
from mta.store import Store
from mta.system.device import compute_with, run_in_short_thread


class EmbeddedEngine(Engine):
    """Serves rows of different people from one base, with one batch and one KV cache.

    At most ``slots`` rows run at once and ``waiting`` more are queued. A prompt and its answer have at most ``length``
    tokens together, never more than the base accepts. At most ``activated`` adapters are cached; merges are never
    stored. While the engine lives, only the engine may use the base's modules.
    """

    def __init__(
        self,
        base: BaseModel,
        bank: Bank,
        store: Store,
        *,
        slots: int = 32,
        length: int | None = None,
        chunk: int = 128,
        waiting: int = QUEUED,
        activated: int = 64,
    ) -> None:
        limit = base.prompts.max_tokens
        super().__init__(min(length or limit, limit), slots + waiting)
        run_in_short_thread(lambda: refuse_unservable(base))
        self.bank, self.store = bank, store
        adapters = run_in_short_thread(lambda: AdapterSlots(base, bank, slots))
        self.scheduler = Scheduler(base, adapters, slots, self.length, chunk)
        self.activated: OrderedDict[ServedModel, RowAdapter] = OrderedDict()  # the least recently used first
        self._most_activated = activated
        self._loading: dict[ServedModel, list[AnswerRow]] = {}  # rows that wait for each adapter being loaded
        self.died = False
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._gone = False  # the thread accepts no calls
        self._lock = threading.Lock()
        self._threads = torch.get_num_threads()
        # Models of people wait for the store, which may hang; the pooled model and the base need none.
        self._loaders = {
            kind: ThreadPoolExecutor(count, "mta-activate", initializer=lambda: compute_with(1))
            for kind, count in ((Version, 2), (SharedModel, 1))
        }
        self._thread = threading.Thread(target=self._run, name="mta-engine", daemon=True)
        self._thread.start()

    # -- from any thread -----------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """False if the thread died, and while every step fails; true after ``close``."""
        return not self.died and not self.scheduler.stuck

    def _begin(self, request: EngineRequest, pieces: Pieces) -> Callable[[], None]:
        loop = asyncio.get_running_loop()
        row = AnswerRow(request, lambda piece: _call_soon(loop, partial(pieces.put_nowait, piece)), Sampler(request))
        self._put(partial(self._enter, row))
        self._open[row] = None

        def cancel() -> None:
            row.cancelled = True
            del self._open[row]

        return cancel

    async def _drop(self, matches: Callable[[Version], bool], error: MtaError, askers: Collection[str] = ()) -> None:
        def dropped(who: ServedModel) -> bool:
            return isinstance(who, Version) and matches(who)

        def ends(who: ServedModel, asker: str) -> bool:
            return dropped(who) or asker in askers

        def work() -> None:
            for row in chain(*self._loading.values()):
                if ends(row.request.who, row.request.asker):
                    row.send(error)
                    row.cancelled = True
            for kept in (self.activated, self._loading):  # what is being loaded for them is not used
                for who in list(filter(dropped, kept)):
                    del kept[who]
            self.scheduler.end(error, lambda owner: ends(*owner))

        await self._in_thread(work)

    async def versions(self) -> set[Version]:
        """Return the person versions in memory: rows, warm slots, and cached adapters."""
        known = set[ServedModel]()
        await self._in_thread(lambda: known.update(self.activated, self.scheduler.known()))
        return {who for who in known if isinstance(who, Version)}

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
        """Return metrics of rows, adapters, and failures."""
        scheduler = self.scheduler
        return {
            "running": (scheduler.running, "Rows that are generating tokens"),
            "waiting": (len(scheduler.waiting), "Rows waiting for a slot"),
            "activated": (len(self.activated), "Cached models: versions of people, base, and pooled model"),
            "failed_steps": (scheduler.failed, "Failed passes, admissions, and merges since the start"),
            "lost": (scheduler.lost, "Answers ended by such failures since the start"),
        }

    async def close(self) -> None:
        """Finish running and waiting requests, accept no new ones, and stop."""
        self._closing = True
        with suppress(EngineGone):
            self._put(lambda: None)  # wakes the thread
        await asyncio.to_thread(self._thread.join)
        for loader in self._loaders.values():
            loader.shutdown()

    def _put(self, call: Callable[[], None]) -> None:
        """Queue a call for the engine's thread, which runs it between two steps. Raises EngineGone."""
        with self._lock:
            if self._gone:
                raise EngineGone("the engine has stopped", hint=LATER)
            self._calls.put(call)

    def _load(self, who: ServedModel, rows: Sequence[AnswerRow]) -> None:
        """Load the adapter of ``rows`` from bank and store, in a thread of the pool: the store may be slow."""
        adapter: RowAdapter | Exception
        try:
            owner = self.store.load(who.person, who.number) if isinstance(who, Version) else who
            adapter = self.scheduler.adapters.adapter_of(owner, isinstance(who, SharedModel) or who.stacked)
        except Exception as error:
            adapter = error
        try:
            self._put(partial(self._enter_loaded, who, rows, adapter))
        except EngineGone as error:
            for row in rows:
                row.send(error)

    # -- the engine's own thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        compute_with(self._threads)
        try:
            while not self._closing or self._loading or self.scheduler.busy or not self._calls.empty():
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
            for row in (row for rows in self._loading.values() for row in rows):
                row.send(EngineGone("the engine has stopped", hint=LATER))
            self.scheduler.end(EngineGone("the engine has stopped", hint=LATER))

    def _run_calls(self, wait: bool) -> None:
        with suppress(queue.Empty):
            while True:
                self._calls.get(block=wait)()
                wait = False

    def _enter(self, row: AnswerRow) -> None:
        """Queue a row for a slot, at once if its adapter is cached; else once it is loaded, for all rows together."""
        if adapter := self.activated.get(row.request.who):
            self.activated.move_to_end(row.request.who)
            row.adapter = adapter
            self.scheduler.waiting.append(row)
        elif waiting := self._loading.get(row.request.who):
            waiting.append(row)
        else:
            rows = self._loading[row.request.who] = [row]
            self._loaders[type(row.request.who)].submit(self._load, row.request.who, rows)

    def _enter_loaded(self, who: ServedModel, rows: Sequence[AnswerRow], adapter: RowAdapter | Exception) -> None:
        """Cache an adapter and queue the rows that wait for it, or end them if loading failed."""
        if self._loading.get(who) is not rows:
            return  # dropped meanwhile
        del self._loading[who]
        rows = [row for row in rows if not row.cancelled]
        if isinstance(adapter, MtaError):
            for row in rows:
                row.send(adapter)
        elif isinstance(adapter, Exception):
            self.scheduler.fail(rows, adapter, "loading an adapter")
        else:
            self.activated[who] = adapter
            if len(self.activated) > self._most_activated:
                self.activated.popitem(last=False)
            for row in rows:
                row.adapter = adapter
                self.scheduler.waiting.append(row)


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    """Run a call in the caller's event loop; do nothing if the loop is closed."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
