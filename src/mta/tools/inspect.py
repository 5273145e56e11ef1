"""Summaries of what is stored for a person, for ``mta person``.

Reads only files of the store and the description of the bank: no weights except the person's stack. A summary contains
no text of the person.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mta.bank.format import read_info
from mta.bank.members import TrainedPart
from mta.errors import PersonNotFound
from mta.store import Store
from mta.store.exports import Export
from mta.store.state import Losses


@dataclass(frozen=True, slots=True)
class Summary:
    """A summary of what is stored for a person.

    ``versions`` are kept ones, oldest first. ``weights``: anchor -> coefficient, the largest first. ``history`` counts
    the items stored by opt-in. ``trained`` names the parts of the bank that were trained on this person, None if the
    bank has no list of members.
    """

    version: int
    versions: list[int]
    time: str | None
    bank: str
    bank_here: str
    policy: str
    weights: dict[int, float]
    stack: dict[str, int] | None
    losses: Losses | None
    history: int | None
    exports: list[Export]
    trained: list[TrainedPart] | None
    bytes: int


def summarize(id: str, store: Store, bank: Path) -> Summary:
    """Return the summary of a person in ``store``, with respect to the bank in a folder.

    Raises PersonNotFound, StateCorrupt, BankCorrupt.
    """
    info = read_info(bank)
    version, kept = store.latest(id), store.history(id)
    if kept and not version:
        raise PersonNotFound(
            f"no state of {id!r} yet, but {len(kept.items)} stored items", hint="Make the state:  mta personalize"
        )
    state = store.load(id, version)
    stack = state.stack
    return Summary(
        version=version or 0,
        versions=store.versions(id),
        time=store.time_of(id, version or 0),
        bank=state.bank,
        bank_here=info.hash,
        policy=state.policy,
        weights=dict(sorted(zip(state.anchors, state.w), key=lambda pair: -pair[1])),
        stack={"rank": stack.rank, "bytes": sum(part.nbytes for part in stack.tensors().values())} if stack else None,
        losses=state.losses,
        history=len(kept.items) if kept else None,
        exports=store.exports.of(id),
        trained=info.members.parts_of(id) if info.members.hashed else None,
        bytes=store.nbytes(id),
    )
