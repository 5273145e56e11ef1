"""Forgetting a person: what is personal goes first, then banks that learnt from the person are marked.

Every step is taken, whatever becomes of the others, and forgetting again finishes what could not be done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mta.bank.format import mark_stale, published, read_info
from mta.errors import BankError, StoreError
from mta.store import Store
from mta.store.exports import Export


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What ``forget`` did: whether states were there, and which trained parts of the bank still hold something.

    ``exports_left``: exported adapters it could not remove, each with the reason. ``published``: where those trained
    parts were published to. ``unknown``: banks that came without their members: nobody here knows whether they learnt
    from the person. ``unmarked``: banks that could not be marked as needing a rebuild, each with the reason.
    ``complete`` is False where forgetting the person again can finish something: mark a bank, remove an export that was
    out of reach.
    """

    states_removed: bool
    needs_rebuild: list[str]
    exports_left: list[str] = field(default_factory=list)
    published: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    unmarked: dict[str, str] = field(default_factory=dict)
    complete: bool = True


def forget_person(person: str, store: Store | None, *banks: Path, keep_exports: bool = False) -> Forgotten:
    """``Personalizer.forget`` without loading a model.

    Without a bank nobody asks what was learnt from the person. Raises StoreError if something of the person could not
    be removed, after everything else was done.
    """
    lists, removed = list[dict[Export | None, str]](), [False]
    failed = list[StoreError]()
    if store:
        failed = _failures_of_passes(
            lambda: store.tombstones.add(person),  # from here on no process saves anything of theirs
            lambda: store.files.remove_folder("work"),  # a stopped run's checkpoint may hold their stack
            lambda: lists.append(store.exports.forget(person, keep=True)),
            lambda: removed.append(store.remove(person)),
        )
        if not failed and not keep_exports:  # what is named now is not named again
            failed = _failures(lambda: lists.append(store.exports.forget(person)))
    damaged = {export: why for each in lists for export, why in each.items() if export is None}  # gone with its pass
    left = damaged | (lists[-1] if lists else {})
    found = replace(_marked(person, banks), states_removed=any(removed), exports_left=list(left.values()))
    if failed:
        reasons = [error.message for error in failed]
        reasons += [f"{bank} could not be marked as needing a rebuild ({why})" for bank, why in found.unmarked.items()]
        raise StoreError(
            f"not everything of the person could be removed: {'; '.join(reasons)}",
            hint="Correct that, and forget the person again: what was removed stays removed.",
        )
    again = any(export and not export.is_final() for export in left)
    return replace(found, complete=not found.unmarked and not again)


def _failures_of_passes(*steps: Callable[[], object]) -> list[StoreError]:
    """Take all steps twice, and return the errors of the last time.

    A process may find the first tombstone and then read what is not removed yet; the second tombstone is newer than
    that. So it comes after a pass that removed everything: where the first one failed there is a third. On a full disk
    removing files makes room for the tombstone.
    """
    first, failed = _failures(*steps), _failures(*steps)
    return _failures(*steps) if first or failed else failed


def _failures(*steps: Callable[[], object]) -> list[StoreError]:
    """Take every step, whatever becomes of the others; return the errors of those that failed."""

    def failure(step: Callable[[], object]) -> StoreError | None:
        try:
            step()
        except StoreError as error:
            return error
        return None

    return [error for step in steps if (error := failure(step))]


def _marked(person: str, banks: Sequence[Path]) -> Forgotten:
    """Mark the banks that learnt from a person as needing a rebuild; what they are, and which could not be marked."""
    found = Forgotten(False, [])
    for bank in banks:
        try:
            members = read_info(bank).members
            if members.hashed is None:
                found.unknown.append(str(bank))
            if parts := members.artefacts_of(person):
                found.needs_rebuild.extend(part for part in parts if part not in found.needs_rebuild)
                found.published.extend(published(bank))
                mark_stale(bank, person)
        except BankError as error:
            found.unmarked[str(bank)] = error.message
    return found
