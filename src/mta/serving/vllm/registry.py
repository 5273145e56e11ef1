"""Adapters a vLLM server knows: who needs each, and how they leave. Unloaded first, deleted after.

vLLM reads an adapter's files again whenever its own caches drop it, and ends with everybody it answers if they are
gone; and its table of names never shrinks by itself.
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

_AGAIN = "Forget the person again in a few seconds: it is done once vLLM agrees."


@dataclass(slots=True, eq=False)
class Loaded:
    """An adapter vLLM may know, the answers that need it, and the error of its cut to a slot's rank once it is told."""

    who: Version | Nobody
    answers: set[asyncio.Task[None]] = field(default_factory=set)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: asyncio.Task[None] | None = None
    error: float | None = None


class Names:
    """The table of a server's adapters; at most ``count`` that nobody needs stay loaded."""

    def __init__(self, client: httpx.AsyncClient, folder: Path, count: int) -> None:
        self.client, self.folder, self.count = client, folder, count
        self.unloaded = 0
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def errors(self) -> list[float]:
        """What the cut loses, for each adapter that was used."""
        return [one.error for one in self._loaded.values() if one.error is not None]

    @asynccontextmanager
    async def held(self, who: Version | Nobody) -> AsyncIterator[str]:
        """For a block in a task of its own, the adapter of that name stays; it is loaded when vLLM is first asked."""
        name, task = wire_name(who), asyncio.current_task()
        assert task is not None
        while (found := self._loaded.get(name)) and found.leaving:
            await asyncio.shield(found.leaving)
        mine = self._loaded.setdefault(name, Loaded(who))
        self._loaded.move_to_end(name)
        mine.answers.add(task)
        mine.idle.clear()
        try:
            yield name
        finally:
            mine.answers.discard(task)
            if not mine.answers:
                mine.idle.set()
            self._trim()

    def used(self, name: str) -> None:
        """Told when vLLM answers by an adapter: what its cut loses is known then."""
        mine = self._loaded[name]
        if mine.error is None and isinstance(mine.who, Version):
            try:
                mine.error = float(json.loads(note_of(self.folder, name).read_text(encoding="utf-8"))["error"])
            except (OSError, ValueError, KeyError):
                mine.error = None

    async def forget(self, person: str) -> None:
        """Wait until nobody needs any adapter of a person, unload them and delete their files. Raises EngineGone.

        vLLM is asked as well: it may know some from before this gateway began.
        """
        for name in await self._listed():
            who = from_wire(name)
            if isinstance(who, Version) and who.person == person:
                self._loaded.setdefault(name, Loaded(who, idle=_set()))
        mine = {n: one for n, one in self._loaded.items() if isinstance(one.who, Version) and one.who.person == person}
        for one in mine.values():
            await one.idle.wait()
        await asyncio.gather(*(asyncio.shield(self._leave(name)) for name in mine if name in self._loaded))
        remove_all(self.folder, person)

    async def versions(self) -> set[Version]:
        """The people who may be loaded, also from before this gateway began. Raises EngineGone."""
        known = [*(from_wire(name) for name in await self._listed()), *(one.who for one in self._loaded.values())]
        return {who for who in known if isinstance(who, Version)}

    async def settled(self) -> None:
        """Wait until whoever is on their way out has left."""
        await asyncio.gather(*(one.leaving for one in self._loaded.values() if one.leaving), return_exceptions=True)

    def answers(self, person: str) -> list[asyncio.Task[None]]:
        """The running answers of a person."""
        mine = [one for one in self._loaded.values() if isinstance(one.who, Version) and one.who.person == person]
        return [task for one in mine for task in one.answers]

    def _trim(self) -> None:
        loaded = self._loaded.items()
        idle = [name for name, one in loaded if isinstance(one.who, Version) and not one.answers and not one.leaving]
        for name in idle[: max(len(idle) - self.count, 0)]:
            self._leave(name)

    def _leave(self, name: str) -> asyncio.Task[None]:
        mine = self._loaded[name]
        mine.leaving = mine.leaving or asyncio.create_task(self._left(name))
        return mine.leaving

    async def _left(self, name: str) -> None:
        try:
            await self._unload(name)
            remove(self.folder, name)
            del self._loaded[name]
            self.unloaded += 1
        finally:
            if name in self._loaded:
                self._loaded[name].leaving = None

    async def _listed(self) -> list[str]:
        """The names vLLM knows; none where it cannot be reached, for then it knows nobody any more."""
        try:
            answer = await self.client.get("/v1/models", timeout=30)
            return [str(model["id"]) for model in answer.raise_for_status().json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            if _nobody_listens(error):
                return []
            raise EngineGone(
                "vLLM does not say whom it knows: somebody's adapter may still be loaded", hint=_AGAIN
            ) from error

    async def _unload(self, name: str) -> None:
        """404 is as good: vLLM did not know it. A server that cannot be reached knows nobody any more."""
        try:
            answer = await self.client.post("/v1/unload_lora_adapter", json={"lora_name": name}, timeout=30)
        except httpx.HTTPError as error:
            if _nobody_listens(error):
                return
            raise EngineGone("vLLM does not answer: the adapter may still be loaded", hint=_AGAIN) from error
        if answer.status_code not in (200, 404):
            raise EngineGone(
                f"vLLM answered {answer.status_code} when it was asked to unload an adapter, expected 200", hint=_AGAIN
            )


def _nobody_listens(error: BaseException | None) -> bool:
    """Whether the server is not there; a connection may fail for other reasons too, and then it may be."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError | FileNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event
