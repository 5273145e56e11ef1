"""Removes people from this gateway's memory when another process forgets them (``mta forget``, another gateway)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from starlette.concurrency import run_in_threadpool

from mta.serving.api.service import Service
from mta.serving.engine import Version
from mta.store.tombstones import NOTHING

log = logging.getLogger("mta")


class Sweep:
    """Looks for new tombstones in the store, and drops the people concerned from memory.

    Each request checks the tombstones too, so no answer uses older data; the sweep drops data that no request asks for.
    A request can load a person again between the tombstone and the removal of the states, so each sweep also compares
    the versions in memory with the store.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._seen = NOTHING

    async def run(self) -> None:
        """Sweep every ``service.sweep`` seconds until cancelled; retry if the store does not answer."""
        failed = False
        while True:
            try:
                await self.once()
                failed = False
            except Exception as error:  # no error may end the loop
                if not failed:
                    log.warning("cannot read which people were forgotten elsewhere: %s", type(error).__name__)
                failed = True
            await asyncio.sleep(self.service.sweep)

    async def once(self) -> None:
        """Drop people with new tombstones, and people with versions in memory that the store no longer has.

        Raises StoreError, EngineGone.
        """
        service, tombstones = self.service, self.service.store.tombstones
        names = await run_in_threadpool(tombstones.names)
        if names != self._seen:
            await run_in_threadpool(service.histories.drop_forgotten, names)
            await run_in_threadpool(service.jobs.drop_forgotten, names)
        versions = await service.engine.versions()
        if names != self._seen:
            people = {version.person for version in versions}
            for person in await run_in_threadpool(tombstones.since, people, self._seen):
                await service.engine.forget(person)
            self._seen = names
        for person in await run_in_threadpool(self._removed, versions):
            await service.engine.forget(person)

    def _removed(self, versions: Collection[Version]) -> set[str]:
        """Return the people with a version that the store no longer has, or has with other content."""
        return {version.person for version in versions if not self._is_kept(version)}

    def _is_kept(self, version: Version) -> bool:
        seal = self.service.store.seal(version.person, version.number)
        return seal is not None and seal[: len(version.seal) or None] == version.seal  # vLLM names shorten seals
