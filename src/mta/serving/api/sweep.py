"""People whom another process forgot (``mta forget``, another gateway) leave this gateway's memory as well."""

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
    """Looks for new tombstones in the store, and drops what is held of their people.

    Requests look for themselves, so nothing is answered or personalized from what is older than a tombstone; this is
    for what nobody asks for any more. Between the tombstone and the removal of the states a request can load the person
    again, so each look also compares the versions in memory with those in the store.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._seen = NOTHING

    async def run(self) -> None:
        """Look every ``service.sweep`` seconds, until it is cancelled. A store that does not answer is asked again."""
        failed = False
        while True:
            try:
                await self.once()
                failed = False
            except Exception as error:  # whatever it is, it must not be the last look
                if not failed:
                    log.warning("cannot read which people were forgotten elsewhere: %s", type(error).__name__)
                failed = True
            await asyncio.sleep(self.service.sweep)

    async def once(self) -> None:
        """Drop what is held of people with new tombstones, or with versions that are not in the store any more.

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
        """The people of those versions that are not in the store any more, or hold something else there."""
        return {version.person for version in versions if not self._is_kept(version)}

    def _is_kept(self, version: Version) -> bool:
        seal = self.service.store.seal(version.person, version.number)
        return seal is not None and seal[: len(version.seal) or None] == version.seal  # vLLM's names cut it short
