"""People whom another process forgot (``mta forget``, another gateway) leave this gateway's memory as well."""

from __future__ import annotations

import asyncio
import logging

from starlette.concurrency import run_in_threadpool

from mta.serving.service import Service
from mta.tombstones import NOTHING

log = logging.getLogger("mta")


class Sweep:
    """Looks for new tombstones in the store, and drops what is held of their people.

    Requests look for themselves, so nothing is answered or personalized from what is older than a tombstone; this is
    for what nobody asks for any more.
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
                    log.warning("whether anybody was forgotten elsewhere is not known: %s", type(error).__name__)
                failed = True
            await asyncio.sleep(self.service.sweep)

    async def once(self) -> None:
        """Drop what is held of people with new tombstones. Raises StoreError, EngineGone."""
        service, tombstones = self.service, self.service.store.tombstones
        names = await run_in_threadpool(tombstones.names)
        if names == self._seen:
            return
        await run_in_threadpool(service.histories.drop_forgotten, names)
        await run_in_threadpool(service.jobs.drop_forgotten, names)
        for person in await run_in_threadpool(tombstones.since, await service.engine.people(), self._seen):
            await service.engine.forget(person)
        self._seen = names
