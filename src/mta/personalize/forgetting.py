"""Forget a person: remove the person's files, then mark the banks that were trained on the person.

If a step fails, the other steps still run. Forgetting the person again repeats the failed steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mta.bank.format import read_info
from mta.bank.notes import mark_stale, published
from mta.errors import BankError, StoreError
from mta.store import Store
from mta.store.exports import Export, Left
from mta.store.run_checkpoints import drop_runs


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The result of ``forget``."""

    states_removed: bool
    needs_rebuild: list[str]  # parts of banks that were trained on the person
    exports_left: list[str] = field(default_factory=list)  # exported adapters that were not removed, with reasons
    published: list[str] = field(default_factory=list)  # addresses where these banks were published
    unknown: list[str] = field(default_factory=list)  # banks without a list of members: perhaps trained on the person
    unmarked: dict[str, str] = field(default_factory=dict)  # banks that could not be marked, with reasons
    complete: bool = True  # False if forgetting again can mark such a bank, or remove an export out of reach


def forget_person(person: str, store: Store | None, *banks: Path, keep_exports: bool = False) -> Forgotten:
    """Do the same as ``Personalizer.forget``, without loading a model. Without ``banks``, no bank is marked.

    Raises StoreError if files of the person could not be removed, after all other steps.
    """
    exports, removed = list[dict[Export | None, Left]](), [False]
    failed = list[StoreError]()
    if store:
        failed = _run_twice(
            lambda: store.tombstones.add(person),  # from now on, no process saves data of the person
            lambda: drop_runs(store.files),  # a killed run's checkpoint may hold the person's stack
            lambda: exports.append(store.exports.forget(person, keep=True)),
            lambda: removed.append(store.remove(person)),
        )
        if not failed and not keep_exports:  # exports that can never be removed are reported only once
            failed = _run(lambda: exports.append(store.exports.forget(person)))
        failed += _run(store.tombstones.remove_expired)
    # A damaged list of exports is reported by the pass that removes the list, and not by later passes.
    damaged = {export: one for each in exports for export, one in each.items() if export is None}
    left = damaged | (exports[-1] if exports else {})
    done = replace(_mark(person, banks), states_removed=any(removed), exports_left=[one.why for one in left.values()])
    if failed:
        reasons = [error.message for error in failed]
        reasons += [f"{bank} could not be marked as needing a rebuild ({why})" for bank, why in done.unmarked.items()]
        raise StoreError(
            f"not all files of the person could be removed: {'; '.join(reasons)}",
            hint="Fix the cause, then forget the person again.",
        )
    return replace(done, complete=not done.unmarked and not any(one.later for one in left.values()))


def _run_twice(*steps: Callable[[], object]) -> list[StoreError]:
    """Run all steps twice, and a third time after an error; return the errors of the last run.

    A process may list the first tombstone and then read files that are not removed yet; the second tombstone tells this
    process that the person was forgotten. So the last tombstone must follow a run that removed everything. On a full
    disk, the first run makes room for the tombstone.
    """
    first, second = _run(*steps), _run(*steps)
    return _run(*steps) if first or second else []


def _run(*steps: Callable[[], object]) -> list[StoreError]:
    """Run every step, also after an error, and return the errors."""
    failed = list[StoreError]()
    for step in steps:
        try:
            step()
        except StoreError as error:
            failed.append(error)
    return failed


def _mark(person: str, banks: Sequence[Path]) -> Forgotten:
    """Mark the banks trained on the person as needing a rebuild."""
    marked = Forgotten(False, [])
    for bank in banks:
        try:
            members = read_info(bank).members
            if members.hashed is None:
                marked.unknown.append(str(bank))
            if parts := members.parts_of(person):
                marked.needs_rebuild.extend(part for part in parts if part not in marked.needs_rebuild)
                try:
                    mark_stale(bank, person)
                finally:  # only now: publishing notes the copy, then reads the mark
                    marked.published.extend(published(bank))
        except BankError as error:
            marked.unmarked[str(bank)] = error.message
    return marked
