"""Tracks the adapters that a vLLM server has loaded: which answers use them, and when they are unloaded.

An adapter is always unloaded before its files are deleted: vLLM reads the files again whenever its own caches drop the
adapter, and crashes if the files are missing. VLLM's table of names never shrinks by itself.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2 as httpx

from mta.personalize.adapters import Nobody
from mta.serving.engine import EngineGone, Version
from mta.serving.model_names import from_wire, wire_name
from mta.serving.vllm.adapters import note_of, remove, remove_all

_RETRY = "Forget the person again in a few seconds; forgetting is complete once vLLM confirms it."


@dataclass(slots=True, eq=False)
class Loaded:
    """An adapter that vLLM may have loaded, the answers that use it, and its truncation error once known."""

    who: Version | Nobody
    answers: set[asyncio.Task[None]] = field(default_factory=set)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    unloading: asyncio.Task[None] | None = None
    error: float | None = None


class AdapterRegistry:
    """The adapters of one server; at most ``count`` idle ones stay loaded."""

    def __init__(self, client: httpx.AsyncClient, folder: Path, count: int) -> None:
        self.client, self.folder, self.count = client, folder, count
        self.unloaded = 0
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def errors(self) -> list[float]:
        """Truncation errors of the adapters that were used."""
        return [one.error for one in self._loaded.values() if one.error is not None]

    @asynccontextmanager
    async def held(self, who: Version | Nobody) -> AsyncIterator[str]:
        """Keep an adapter loaded within the block, which needs its own task; vLLM loads it at the first request."""
        name, task = wire_name(who), asyncio.current_task()
        assert task is not None
        while (found := self._loaded.get(name)) and found.unloading:
            await asyncio.shield(found.unloading)
        entry = self._loaded.setdefault(name, Loaded(who))
        self._loaded.move_to_end(name)
        entry.answers.add(task)
        entry.idle.clear()
        try:
            yield name
        finally:
            entry.answers.discard(task)
            if not entry.answers:
                entry.idle.set()
            self._trim()

    def used(self, name: str) -> None:
        """Record that vLLM answered with an adapter: its truncation error can be read now."""
        entry = self._loaded[name]
        if entry.error is None and isinstance(entry.who, Version):
            try:
                entry.error = float(json.loads(note_of(self.folder, name).read_text(encoding="utf-8"))["error"])
            except (OSError, ValueError, KeyError):
                entry.error = None

    async def forget(self, person: str) -> None:
        """Wait until no answer uses the person's adapters, unload them, and delete their files. Raises EngineGone.

        Also covers adapters that vLLM loaded before this gateway started.
        """
        for name in await self._listed():
            who = from_wire(name)
            if isinstance(who, Version) and who.person == person:
                self._loaded.setdefault(name, Loaded(who, idle=_set()))
        entries = {n: e for n, e in self._loaded.items() if isinstance(e.who, Version) and e.who.person == person}
        for entry in entries.values():
            await entry.idle.wait()
        await asyncio.gather(*(asyncio.shield(self._start_unloading(name)) for name in entries if name in self._loaded))
        remove_all(self.folder, person)

    async def versions(self) -> set[Version]:
        """Return the person versions that may be loaded, also from before this gateway started. Raises EngineGone."""
        known = [*(from_wire(name) for name in await self._listed()), *(one.who for one in self._loaded.values())]
        return {who for who in known if isinstance(who, Version)}

    async def settled(self) -> None:
        """Wait until all running unloads are done."""
        await asyncio.gather(*(one.unloading for one in self._loaded.values() if one.unloading), return_exceptions=True)

    def answers(self, person: str) -> list[asyncio.Task[None]]:
        """Return the running answers of a person."""
        entries = [e for e in self._loaded.values() if isinstance(e.who, Version) and e.who.person == person]
        return [task for entry in entries for task in entry.answers]

    def _trim(self) -> None:
        loaded = self._loaded.items()
        idle = [name for name, one in loaded if isinstance(one.who, Version) and not one.answers and not one.unloading]
        for name in idle[: max(len(idle) - self.count, 0)]:
            self._start_unloading(name)

    def _start_unloading(self, name: str) -> asyncio.Task[None]:
        entry = self._loaded[name]
        entry.unloading = entry.unloading or asyncio.create_task(self._remove(name))
        return entry.unloading

    async def _remove(self, name: str) -> None:
        try:
            await self._unload(name)
            remove(self.folder, name)
            del self._loaded[name]
            self.unloaded += 1
        finally:
            if name in self._loaded:
                self._loaded[name].unloading = None

    async def _listed(self) -> list[str]:
        """Return the names that vLLM knows; none if the server is gone, because a stopped server holds nothing."""
        try:
            answer = await self.client.get("/v1/models", timeout=30)
            return [str(model["id"]) for model in answer.raise_for_status().json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            if _is_server_gone(error):
                return []
            raise EngineGone(
                "vLLM did not list its models: an adapter of the person may still be loaded", hint=_RETRY
            ) from error

    async def _unload(self, name: str) -> None:
        """Unload an adapter. 404 counts as success, and so does a stopped server. Raises EngineGone."""
        try:
            answer = await self.client.post("/v1/unload_lora_adapter", json={"lora_name": name}, timeout=30)
        except httpx.HTTPError as error:
            if _is_server_gone(error):
                return
            raise EngineGone("vLLM does not answer: the adapter may still be loaded", hint=_RETRY) from error
        if answer.status_code not in (200, 404):
            raise EngineGone(
                f"vLLM answered {answer.status_code} to an unload request, expected 200 or 404", hint=_RETRY
            )


def _is_server_gone(error: BaseException | None) -> bool:
    """Whether the server has stopped; after other connection errors it may still run."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError | FileNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event
