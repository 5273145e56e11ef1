"""``/v1/people``: stored data of a person, history, background personalization, and forgetting.

Only a key that owns a person may use these routes; unauthorized and unknown person ids get the same 404.
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
    """One item: the task's fields and a time."""

    fields: dict[str, str]
    time: Annotated[float | None, Field(allow_inf_nan=False)] = None


class History(_Body):
    """Items to append; ``keep`` stores them, otherwise they are lost when the server stops."""

    items: Annotated[list[NewItem], Field(min_length=1)]
    keep: bool = False


class Personalize(_Body):
    """Personalize from all known items, or from the ``latest`` most recent ones."""

    latest: Annotated[int | None, Field(ge=1)] = None


def add_people(app: FastAPI, service: Service) -> None:
    """Add the routes for people's data."""
    _add_history(app, service, service.histories)
    _add_state(app, service, service.histories)


def _add_history(app: FastAPI, service: Service, histories: Histories) -> None:
    @app.post("/v1/people/{id:path}/history")
    async def history(id: str, body: History, key: Caller) -> dict[str, Any]:
        """Append items to a person's history."""
        _own(key, id)
        new = [_item(service.task, item, service.limits.item) for item in body.items]
        async with service.lock(id):
            return {"items": await run_in_threadpool(histories.append, id, new, body.keep, key), "kept": body.keep}

    @app.post("/v1/people/{id:path}/personalize", status_code=202)
    async def personalize(id: str, key: Caller, body: Personalize | None = None) -> dict[str, Any]:
        """Start stages 2 and 3 in the background."""
        _own(key, id)
        await service.check_fresh()
        latest = body.latest if body else None
        async with service.lock(id):
            since = await run_in_threadpool(service.store.tombstones.of, id)
            person = await run_in_threadpool(histories.of, id, since)
            if person is None:
                raise Refused("this person has no items", hint="Append some first: POST …/history")
            return _status_body(service.jobs.put(person.latest(latest) if latest else person, key, since))

    @app.get("/v1/people/{id:path}/personalize")
    async def status(id: str, key: Caller) -> dict[str, Any]:
        """Return the progress of stages 2 and 3."""
        _own(key, id)
        found = service.jobs.status(id)
        if found is None:
            raise _unknown()
        return _status_body(found)


def _add_state(app: FastAPI, service: Service, histories: Histories) -> None:
    @app.get("/v1/people/{id:path}")
    async def kept(id: str, key: Caller) -> dict[str, Any]:
        """Return the stored data of a person: opaque anchor numbers, coefficients, versions, bytes."""
        _own(key, id)
        return await run_in_threadpool(_kept, service.store, id, histories)

    @app.delete("/v1/people/{id:path}")
    async def forget(id: str, key: Caller) -> dict[str, Any]:
        """Delete all stored data of a person; name the task LoRA and banks that must be rebuilt without the person."""
        _own(key, id)
        if key.share:  # each request leaves a tombstone, even for an unknown person
            check_rate(service.forgets, key)
        async with service.lock(id):
            held = histories.forget(id)
            try:
                found = await service.jobs.forget(id)
                service.is_stale |= bool(found.needs_rebuild)
            finally:
                await service.engine.forget(id)
            if found.exports_left and key.rights == "admin":  # reported below; for other keys, mta forget reports them
                await run_in_threadpool(service.store.exports.forget, id)
        report = {"removed": found.states_removed or held, "needs_rebuild": found.needs_rebuild}
        report |= {"exports_left": len(found.exports_left), "banks_unmarked": len(found.unmarked)}
        named = {"exports": found.exports_left, "banks": found.unmarked} if key.rights == "admin" else {}
        return report | {name: left for name, left in named.items() if left}


def _own(key: Key, id: str) -> None:
    if not id or not key.owns(id):
        raise _unknown()


def _unknown() -> NobodyHere:
    return NobodyHere(
        "this person does not exist, or this key may not see them",
        hint="If the key owns the person, append items first: POST …/history",
    )


def _item(task: Task, item: NewItem, longest: int) -> Item:
    needed = task.fields()
    if missing := [name for name in needed if name not in item.fields]:
        raise Refused(
            f"an item has no field {missing[0]!r}; items of this task have {', '.join(needed)}",
            hint=f"Add the field  {missing[0]}.",
        )
    if extra := sorted(set(item.fields) - set(needed)):
        raise Refused(
            f"an item has an unknown field {extra[0]!r}; items of this task have {', '.join(needed)}",
            hint=f"Remove the field  {extra[0]}.",
        )
    if max(map(len, item.fields.values())) > longest:
        raise Refused(
            f"a field of an item has more than {longest} characters", hint=f"Send at most {longest} characters."
        )
    try:
        return replace(item_in(item.fields, task), time=item.time)
    except Bad as bad:
        raise Refused(f"an item's field {bad.field!r}: {bad.reason}", hint="See GET /v1/task for the fields.") from None


def _status_body(status: Status) -> dict[str, Any]:
    return {"status": status.state, "version": status.version, "message": status.message}


def _kept(store: Store, id: str, histories: Histories) -> dict[str, Any]:
    versions, kept, held = store.versions(id), store.history(id), histories.held(id)
    if not versions and not kept and not held:
        raise _unknown()
    report: dict[str, Any] = {"versions": versions, "bytes": store.nbytes(id)}
    report |= {"items_kept": len(kept.items) if kept else 0, "items_held": held}
    if versions:
        state = store.load(id)
        report |= {"version": versions[-1], "anchors": state.anchors, "w": state.w, "policy": state.policy}
        report |= {"stack": state.stack is not None, "merge": state.mode}
    return report
