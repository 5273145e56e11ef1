"""Tracks the adapters that a vLLM server has loaded: which answers use them, and when they are unloaded.

An adapter is always unloaded before its files are deleted: vLLM reads the files again whenever its own caches drop the
adapter, and crashes if the files are missing. VLLM's table of names never shrinks by itself.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx2 as httpx

from mta.serving.engine import EngineGone, ModelRemoved, ServedModel, Version, together, wire_name
from mta.serving.vllm.adapters import folder_of
from mta.serving.vllm.server import VllmServer

log = logging.getLogger("mta")
_RETRY = "Forget the person again in a few seconds; forgetting is complete once vLLM confirms it."


@dataclass(slots=True, eq=False)
class Loaded:
    """An adapter that vLLM may have loaded, and the number of answers that use it."""

    who: ServedModel
    answers: int = 0
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while the adapter is unloaded
    dropped: bool = False  # as of a forgotten person: no further answer may use it


class AdapterRegistry:
    """The adapters of one server; at most ``count`` idle ones stay loaded."""

    def __init__(self, client: httpx.AsyncClient, server: VllmServer, count: int) -> None:
        self.client, self.server, self.count = client, server, count
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()  # the least recently used first
        self._unloads: set[asyncio.Task[None]] = set()  # of idle adapters

    def __len__(self) -> int:
        return len(self._loaded)

    @asynccontextmanager
    async def held(self, who: ServedModel) -> AsyncIterator[str]:
        """Keep an adapter loaded within the block; vLLM loads it at the first request. Raises ModelRemoved."""
        name = wire_name(who)
        while True:
            entry = self._loaded.setdefault(name, Loaded(who))
            async with entry.changing:
                if entry.dropped:
                    raise ModelRemoved("the person's model was removed", hint="Ask the pooled model: task")
                if self._loaded.get(name) is entry:  # else it was unloaded meanwhile
                    break
        self._loaded.move_to_end(name)
        entry.answers += 1
        try:
            yield name
        finally:
            entry.answers -= 1
            idle = [name for name, one in self._of().items() if not one.answers and not one.changing.locked()]
            for name in idle[: max(len(idle) - self.count, 0)]:
                self._start_unloading(name)

    async def drop(self, matches: Callable[[Version], bool], end: Callable[[], Collection[asyncio.Task[None]]]) -> None:
        """Unload these adapters and delete their files, after all answers that use them. Raises EngineGone.

        ``end`` ends these answers, and returns those that are not done. Also covers answers that begin meanwhile.
        """
        for entry in self._of(matches).values():
            entry.dropped = True
        while answers := end():
            await asyncio.wait(answers)
        await together(self._unload(name) for name in self._of(matches))

    def versions(self) -> set[Version]:
        """Return the person versions that may be loaded; dropped ones that were not unloaded are tried again."""
        people = self._of()
        for name, entry in people.items():
            if entry.dropped and not entry.answers:
                self._start_unloading(name)
        return {entry.who for entry in people.values() if isinstance(entry.who, Version)}

    async def unloads_ended(self) -> None:
        """Wait until all idle adapters that are being unloaded are unloaded."""
        await asyncio.gather(*self._unloads)

    def _of(self, matches: Callable[[Version], bool] = lambda _: True) -> dict[str, Loaded]:
        """Return the adapters of the versions that match, or of all people, by name."""
        return {name: one for name, one in self._loaded.items() if isinstance(one.who, Version) and matches(one.who)}

    def _start_unloading(self, name: str) -> None:
        async def unload() -> None:
            try:
                await self._unload(name)
            except EngineGone as error:  # the adapter stays loaded, and can be used
                log.warning("an idle adapter was not unloaded: %s", type(error).__name__)

        task = asyncio.create_task(unload())
        self._unloads.add(task)
        task.add_done_callback(self._unloads.discard)

    async def _unload(self, name: str) -> None:
        """Unload an adapter that no answer uses, and delete its files. Raises EngineGone."""
        if entry := self._loaded.get(name):
            async with entry.changing:
                if not entry.answers and self._loaded.get(name) is entry:
                    await self._ask_to_unload(name)
                    shutil.rmtree(self.server.folder / folder_of(name), ignore_errors=True)
                    del self._loaded[name]

    async def _ask_to_unload(self, name: str) -> None:
        """Raise EngineGone if vLLM may still have the adapter; a server that has stopped holds nothing."""
        try:
            answer = await self.client.post("/v1/unload_lora_adapter", timeout=30, json={"lora_name": name})
        except httpx.HTTPError as error:
            if not self.server.up:
                return
            raise EngineGone("vLLM does not answer: an adapter of the person may still be loaded", _RETRY) from error
        if answer.status_code not in (200, 404):
            raise EngineGone(f"vLLM answered {answer.status_code} to a request to unload an adapter", hint=_RETRY)
