"""``/v1/people``: what is kept of a person, their history, stages 2 and 3 in the background, and forgetting.

Only who owns a person may use these routes; anybody else, and anybody who asks for somebody unknown, gets the same 404.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from mta.data.history import Item
from mta.data.readers.rejects import Bad
from mta.data.readers.rows import item_in
from mta.data.tasks.task import Task
from mta.serving.api.auth import Key
from mta.serving.api.histories import Histories
from mta.serving.api.jobs import Status
from mta.serving.api.service import Caller, NobodyHere, Service, check_rate
from mta.serving.engine import Refused
from mta.store import Store


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewItem(_Body):
    """One thing a person did: the task's fields, and when."""

    fields: dict[str, str]
    time: Annotated[float | None, Field(allow_inf_nan=False)] = None


class History(_Body):
    """Items to be appended; they outlive the server only where ``keep`` says so."""

    items: Annotated[list[NewItem], Field(min_length=1)]
    keep: bool = False


class Personalize(_Body):
    """Personalize from what is known of the person, or from their most recent items alone."""

    latest: Annotated[int | None, Field(ge=1)] = None


def add_people(app: FastAPI, service: Service) -> None:
    """The routes for what is kept of people."""
    _add_history(app, service, service.histories)
    _add_state(app, service, service.histories)


def _add_history(app: FastAPI, service: Service, histories: Histories) -> None:
    @app.post("/v1/people/{id:path}/history")
    async def history(id: str, body: History, key: Caller) -> dict[str, Any]:
        """Append items to what is known of a person."""
        _own(key, id)
        new = [_item(service.task, item, service.limits.item) for item in body.items]
        async with service.lock(id):
            return {"items": await run_in_threadpool(histories.append, id, new, body.keep, key), "kept": body.keep}

    @app.post("/v1/people/{id:path}/personalize", status_code=202)
    async def personalize(id: str, key: Caller, body: Personalize | None = None) -> dict[str, Any]:
        """Stages 2 and 3, in the background."""
        _own(key, id)
        await service.check_fresh()
        latest = body.latest if body else None
        async with service.lock(id):
            since = await run_in_threadpool(service.store.tombstones.of, id)
            person = await run_in_threadpool(histories.of, id, since)
            if person is None:
                raise Refused("no item is known of this person", hint="Append some first: POST …/history")
            return _told(service.jobs.put(person.latest(latest) if latest else person, key, since))

    @app.get("/v1/people/{id:path}/personalize")
    async def status(id: str, key: Caller) -> dict[str, Any]:
        """How far stages 2 and 3 are."""
        _own(key, id)
        found = service.jobs.status(id)
        if found is None:
            raise _unknown()
        return _told(found)


def _add_state(app: FastAPI, service: Service, histories: Histories) -> None:
    @app.get("/v1/people/{id:path}")
    async def kept(id: str, key: Caller) -> dict[str, Any]:
        """What is kept of a person: opaque anchor numbers, coefficients, versions, bytes."""
        _own(key, id)
        return await run_in_threadpool(_kept, service.store, id, histories)

    @app.delete("/v1/people/{id:path}")
    async def forget(id: str, key: Caller) -> dict[str, Any]:
        """Remove all that is kept of a person; what was learnt from them in task LoRA and bank is named."""
        _own(key, id)
        if key.share:  # each leaves a tombstone, whether anything is known of the person or not
            check_rate(service.forgets, key)
        async with service.lock(id):
            held = histories.forget(id)
            try:
                found = await service.jobs.forget(id)
                service.is_stale |= bool(found.needs_rebuild)
            finally:
                await service.engine.forget(id)
            if found.exports_left and key.rights == "admin":  # told now; others leave it to mta forget
                await run_in_threadpool(service.store.exports.forget, id)
        told = {"removed": found.states_removed or held, "needs_rebuild": found.needs_rebuild}
        told |= {"exports_left": len(found.exports_left), "banks_unmarked": len(found.unmarked)}
        named = {"exports": found.exports_left, "banks": found.unmarked} if key.rights == "admin" else {}
        return told | {name: left for name, left in named.items() if left}


def _own(key: Key, id: str) -> None:
    if not id or not key.owns(id):
        raise _unknown()


def _unknown() -> NobodyHere:
    return NobodyHere(
        "this person does not exist, or this key may not see them",
        hint="Where the key may, items make them known: POST …/history",
    )


def _item(task: Task, item: NewItem, longest: int) -> Item:
    needed = task.fields()
    if missing := [name for name in needed if name not in item.fields]:
        raise Refused(
            f"an item lacks the field {missing[0]!r}; this task's items have {', '.join(needed)}",
            hint=f"Send  {missing[0]}  too.",
        )
    if extra := sorted(set(item.fields) - set(needed)):
        raise Refused(
            f"an item has a field {extra[0]!r} too many; this task's items have {', '.join(needed)}",
            hint=f"Leave  {extra[0]}  out.",
        )
    if max(map(len, item.fields.values())) > longest:
        raise Refused(
            f"a field of an item has more than {longest} characters", hint=f"Send the first {longest} of them."
        )
    try:
        return replace(item_in(item.fields, task), time=item.time)
    except Bad as bad:
        raise Refused(f"an item's field {bad.field!r}: {bad.reason}", hint="Send it as the task has it.") from None


def _told(status: Status) -> dict[str, Any]:
    return {"status": status.state, "version": status.version, "message": status.message}


def _kept(store: Store, id: str, histories: Histories) -> dict[str, Any]:
    versions, kept, held = store.versions(id), store.history(id), histories.held(id)
    if not versions and not kept and not held:
        raise _unknown()
    told: dict[str, Any] = {"versions": versions, "bytes": store.nbytes(id)}
    told |= {"items_kept": len(kept.items) if kept else 0, "items_held": held}
    if versions:
        state = store.load(id)
        told |= {"version": versions[-1], "anchors": state.anchors, "w": state.w, "policy": state.policy}
        told |= {"stack": state.stack is not None, "merge": state.mode}
    return told
