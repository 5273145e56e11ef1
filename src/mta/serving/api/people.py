"""``/v1/people``: stored data of a person, history, background personalization, and forgetting.

Only a key that owns a person may use these routes; unauthorized and unknown person ids get the same 404.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from mta.data.history import Item, Person
from mta.data.readers.rejects import Bad
from mta.data.readers.rows import item_in, time_in
from mta.data.tasks.task import Task
from mta.errors import DataError, PersonNotFound, StateCorrupt
from mta.serving.api.auth import Key
from mta.serving.api.errors import UnknownOrForbidden
from mta.serving.api.jobs import Status
from mta.serving.api.schemas import ValidText
from mta.serving.api.service import Caller, Gateway, Service
from mta.serving.engine import Refused
from mta.store import Store


def _refuse_line_break(http: HttpRequest) -> None:
    """Raises UnknownOrForbidden for a path that ends with a line break: routes would find the path without it."""
    if http.scope["path"].endswith("\n"):
        raise _unknown()


router = APIRouter(prefix="/v1/people", dependencies=[Depends(_refuse_line_break)])


class NewItem(BaseModel, extra="forbid"):
    """One item: the task's fields and a time."""

    fields: dict[ValidText, ValidText]
    time: Annotated[float | None, Field(allow_inf_nan=False)] = None


class History(BaseModel, extra="forbid"):
    """Items to append; ``keep`` stores them, otherwise they are lost when the server stops."""

    items: Annotated[list[NewItem], Field(min_length=1, fail_fast=True)]
    keep: bool = False


class Personalize(BaseModel, extra="forbid"):
    """Personalize from all known items, or from the ``latest`` most recent ones."""

    latest: Annotated[int | None, Field(ge=1)] = None


@router.post("/{id:path}/history")
async def history(service: Gateway, id: str, body: History, key: Caller) -> dict[str, Any]:
    """Append items to a person's history."""
    _own(key, id)
    service.histories.check_count(len(body.items))  # before each is read
    new = [_item(service.task, item, service.limits.item) for item in body.items]
    await service.in_turn(key, _check_lengths, service, new)
    async with service.lock(id):
        count = await run_in_threadpool(service.histories.append, id, new, body.keep, key)
    return {"items": count, "kept": body.keep}


@router.post("/{id:path}/personalize", status_code=202)
async def personalize(service: Gateway, id: str, key: Caller, body: Personalize | None = None) -> dict[str, Any]:
    """Start stages 2 and 3 in the background."""
    _own(key, id)
    await service.check_fresh()
    latest = body.latest if body else None
    async with service.lock(id):
        session = await run_in_threadpool(service.store.session, id)
        person = await run_in_threadpool(service.histories.of, id)
        if person is None:
            raise Refused("this person has no items", hint="Append some first: POST …/history")
        if latest is None:
            await run_in_threadpool(_check_not_fewer, service.store, person)
        chosen = person.latest(latest) if latest else person
        return _status_body(service.jobs.put(chosen, session, key))


@router.get("/{id:path}/personalize")
async def status(service: Gateway, id: str, key: Caller) -> dict[str, Any]:
    """Return the progress of stages 2 and 3."""
    _own(key, id)
    progress = await run_in_threadpool(service.jobs.status, id)
    if progress is None:
        raise UnknownOrForbidden(
            "no personalization of this person was asked for since the server started",
            hint="What is stored: GET /v1/people/…   To start: POST …/personalize",
        )
    return _status_body(progress)


@router.get("/{id:path}")
def kept(service: Gateway, id: str, key: Caller) -> dict[str, Any]:
    """Return the stored data of a person: opaque anchor numbers, coefficients, versions, bytes."""
    _own(key, id)
    store = service.store
    versions, items, held = store.versions(id), store.history(id), service.histories.held(id)
    if not versions and not items and not held:
        raise _unknown()
    report: dict[str, Any] = {"versions": versions, "bytes": store.nbytes(id)}
    report |= {"items_kept": len(items.items) if items else 0, "items_held": held}
    if versions:
        state = store.load(id)
        report |= {"version": versions[-1], "anchors": state.anchors, "w": state.w, "policy": state.policy}
        report |= {"stack": state.stack is not None}
    return report


@router.delete("/{id:path}")
async def forget(service: Gateway, id: str, key: Caller) -> dict[str, Any]:
    """Delete all stored data of a person; name the task LoRA and banks that must be rebuilt without the person."""
    _own(key, id)
    if key.share:  # each request leaves a tombstone, even for an unknown person
        service.forgets.count(key.name)
    async with service.lock(id):
        held = service.histories.forget(id)
        try:
            forgotten = await service.jobs.forget(id)
            service.is_stale |= bool(forgotten.needs_rebuild)
        finally:
            await service.engine.forget(id, service.keys_of(id))
        if forgotten.exports_left and key.rights == "admin":  # reported below; for other keys, mta forget reports them
            await run_in_threadpool(service.store.exports.forget, id)
        await service.has_forgotten(id)
    report = {"removed": forgotten.states_removed or held, "needs_rebuild": forgotten.needs_rebuild}
    report |= {"exports_left": len(forgotten.exports_left), "banks_unmarked": len(forgotten.unmarked)}
    named = {"exports": forgotten.exports_left, "banks": forgotten.unmarked, "published": forgotten.published}
    named |= {"unknown": forgotten.unknown}
    return report | {name: left for name, left in named.items() if left and key.rights == "admin"}


def _check_not_fewer(store: Store, person: Person) -> None:
    """Raises Refused if the person's state was made from more items than this server knows, or from as many others.

    So it is after a restart, for items that were not kept.
    """
    try:
        state = store.load(person.id)
    except (PersonNotFound, StateCorrupt):
        return
    known, others = len(person.items), bool(state.history) and not person.grown_from(state.history)
    if state.shots > known or (state.shots == known and others):
        raise Refused(
            f"the person's model was made from {state.shots} items, "
            f"and this server knows {known} of the person's items" + (", others" if state.shots == known else ""),
            hint="Append the others first (mta personalize --keep-histories keeps those of a file); "
            f'or make it from these alone: {{"latest": {known}}}',
        )


def _own(key: Key, id: str) -> None:
    """Raises UnknownOrForbidden if the key does not own the person."""
    if not id or not key.owns(id):
        raise _unknown()


def _unknown() -> UnknownOrForbidden:
    return UnknownOrForbidden(
        "this person does not exist, or this key may not see them",
        hint="If the key owns the person, append items first: POST …/history",
    )


def _check_lengths(service: Service, items: Sequence[Item]) -> None:
    """Raises Refused for an item that no prompt could hold: the person could not be personalized with it."""
    try:
        service.base.prompts.check(service.task, ((f"item {n}", item) for n, item in enumerate(items, 1)))
    except DataError as error:
        raise Refused(error.message, hint="Shorten it, or leave it out.") from None


def _item(task: Task, item: NewItem, longest: int) -> Item:
    needed, given = task.fields(), item.fields
    if extra := sorted(given.keys() - set(needed)):
        raise Refused(
            f"an item has an unknown field {extra[0]!r}; items of this task have {', '.join(needed)}",
            hint=f"Remove the field  {extra[0]}.",
        )
    if any(len(text) > longest for text in given.values()):
        raise Refused(
            f"a field of an item has more than {longest} characters", hint=f"Send at most {longest} characters."
        )
    try:
        return replace(item_in(given, task), time=time_in({"time": item.time}, "time"))
    except Bad as bad:
        raise Refused(f"an item's field {bad.field!r}: {bad.reason}", hint="See GET /v1/task for the fields.") from None


def _status_body(status: Status) -> dict[str, Any]:
    return {"status": status.state, "version": status.version, "message": status.message}
