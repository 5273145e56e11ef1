"""Tracks the adapters that a vLLM server has loaded: which answers use them, and when they are unloaded.

An adapter is always unloaded before its files are deleted: vLLM reads the files again whenever its own caches drop the
adapter, and crashes if the files are missing. VLLM's table of names never shrinks by itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx

from mta.personalize.adapters import SharedModel
from mta.serving.engine import EngineGone, ModelRemoved, Version
from mta.serving.model_names import from_wire, wire_name
from mta.serving.vllm.adapters import CUT, folder_of

log = logging.getLogger("mta")
_RETRY = "Forget the person again in a few seconds; forgetting is complete once vLLM confirms it."


@dataclass(slots=True, eq=False)
class Loaded:
    """An adapter that vLLM may have loaded, and the answers that use it."""

    who: Version | SharedModel
    answers: set[asyncio.Task[None]] = field(default_factory=set)
    unloading: asyncio.Task[None] | None = None
    dropped: bool = False  # as of a forgotten person: nobody may use it again


class AdapterRegistry:
    """The adapters of one server; at most ``count`` idle ones stay loaded."""

    def __init__(self, client: httpx.AsyncClient, folder: Path, count: int) -> None:
        self.client, self.folder, self.count = client, folder, count
        self.unloaded = 0
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._loaded)

    def cut_error(self) -> float:
        """Return the largest relative error of truncation among the loaded adapters."""
        errors = [0.0]
        for name in self._loaded:
            with suppress(OSError, ValueError, KeyError):  # vLLM may still build one
                errors.append(json.loads((self.folder / folder_of(name) / CUT).read_text(encoding="utf-8"))["error"])
        return max(errors)

    @asynccontextmanager
    async def held(self, who: Version | SharedModel) -> AsyncIterator[str]:
        """Keep an adapter loaded within the block, which needs its own task; vLLM loads it at the first request.

        Raises ModelRemoved for a dropped one, EngineGone.
        """
        name, task = wire_name(who), asyncio.current_task()
        assert task is not None
        while (found := self._loaded.get(name)) and found.unloading:
            try:
                await asyncio.shield(found.unloading)
            except EngineGone:
                if found.dropped:
                    raise  # else it was only idle, is still loaded, and can be used
        if found and found.dropped:
            raise ModelRemoved("the person's model was removed", hint="Ask the pooled model: task")
        entry = self._loaded.setdefault(name, Loaded(who))
        self._loaded.move_to_end(name)
        entry.answers.add(task)
        try:
            yield name
        finally:
            entry.answers.discard(task)
            idle = [name for name, one in self._of().items() if not one.answers and not one.unloading]
            for name in idle[: max(len(idle) - self.count, 0)]:
                self._start_unloading(name).add_done_callback(_note_failure)

    async def drop(self, matches: Callable[[Version], bool], end: Callable[[asyncio.Task[None]], None]) -> None:
        """``end`` all answers that use these adapters, unload them, and delete their files. Raises EngineGone.

        Also covers adapters that vLLM loaded before this gateway started, and answers that begin meanwhile.
        """
        for answer in self.answers(matches):
            end(answer)
        for name in await self._listed():
            who = from_wire(name)
            if isinstance(who, Version) and matches(who):
                self._loaded.setdefault(name, Loaded(who))
        for entry in self._of(matches).values():
            entry.dropped = True
        while answers := self.answers(matches):
            for answer in answers:
                end(answer)
            await asyncio.wait(answers)
        await asyncio.gather(*(asyncio.shield(self._start_unloading(name)) for name in self._of(matches)))

    async def versions(self) -> set[Version]:
        """Return the person versions that may be loaded. Raises EngineGone.

        Adapters from before this gateway started count as idle ones from now on: the first to be unloaded. Dropped ones
        that could not be unloaded are tried again.
        """
        for name in await self._listed():
            who = from_wire(name)
            if isinstance(who, Version) and name not in self._loaded:
                self._loaded[name] = Loaded(who)
                self._loaded.move_to_end(name, last=False)
        for name, one in self._of().items():
            if one.dropped and not one.answers and not one.unloading:
                self._start_unloading(name).add_done_callback(_note_failure)
        return {one.who for one in self._loaded.values() if isinstance(one.who, Version)}

    async def unloads_ended(self) -> None:
        """Wait until all running unloads are done."""
        await asyncio.gather(*(one.unloading for one in self._loaded.values() if one.unloading), return_exceptions=True)

    def answers(self, matches: Callable[[Version], bool]) -> list[asyncio.Task[None]]:
        """Return the running answers of the versions that match."""
        return [task for entry in self._of(matches).values() for task in entry.answers]

    def _of(self, matches: Callable[[Version], bool] = lambda _: True) -> dict[str, Loaded]:
        """Return the adapters of the versions that match, or of all people, by name."""
        return {name: one for name, one in self._loaded.items() if isinstance(one.who, Version) and matches(one.who)}

    def _start_unloading(self, name: str) -> asyncio.Task[None]:
        entry = self._loaded[name]
        entry.unloading = entry.unloading or asyncio.create_task(self._remove(name))
        return entry.unloading

    async def _remove(self, name: str) -> None:
        try:
            await self._asked("POST", "/v1/unload_lora_adapter", (200, 404), json={"lora_name": name})
            shutil.rmtree(self.folder / folder_of(name), ignore_errors=True)
            del self._loaded[name]
            self.unloaded += 1
        finally:
            if name in self._loaded:
                self._loaded[name].unloading = None

    async def _listed(self) -> list[str]:
        """Return the names that vLLM knows. Raises EngineGone."""
        answer = await self._asked("GET", "/v1/models", (200,))
        return [str(model["id"]) for model in answer.json()["data"]] if answer else []

    async def _asked(self, method: str, path: str, expected: tuple[int, ...], **how: Any) -> httpx.Response | None:
        """Return vLLM's response; None if the server has stopped, because a stopped server holds nothing.

        Raises EngineGone if the server may still run and did not do as asked.
        """
        try:
            answer = await self.client.request(method, path, timeout=30, **how)
        except httpx.HTTPError as error:
            if _is_server_gone(error):
                return None
            raise EngineGone("vLLM does not answer: an adapter of the person may still be loaded", _RETRY) from error
        if answer.status_code not in expected:
            raise EngineGone(f"vLLM answered {answer.status_code} to {path}, expected {expected}", hint=_RETRY)
        return answer


def _note_failure(unloading: asyncio.Task[None]) -> None:
    """Log why an idle adapter was not unloaded: nothing else waits for this."""
    if not unloading.cancelled() and (error := unloading.exception()):
        log.warning("an idle adapter was not unloaded: %s", type(error).__name__)


def _is_server_gone(error: BaseException | None) -> bool:
    """Whether the server has stopped; after other connection errors it may still run."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError | FileNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False
