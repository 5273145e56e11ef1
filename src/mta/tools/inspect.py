"""Summaries of what is stored for a person, for ``mta person``.

Reads only files of the store and the description of the bank: no weights except the person's stack. A summary contains
no text of the person.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from mta.bank.format import BankInfo, read_info
from mta.config import Run, override
from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.errors import ConfigError, DataError, PersonNotFound, StateCorrupt
from mta.store import Store
from mta.store.exports import Export
from mta.store.state import Losses, State
from mta.tools.cost import KNOWN, Load, Shape, costs, hardware, passes

_CHARACTERS = 4.0  # per token, approximately, for English text


@dataclass(frozen=True, slots=True)
class Weight:
    """An anchor's number in its bank and its coefficient in the merge."""

    anchor: int
    w: float


@dataclass(frozen=True, slots=True)
class Stack:
    """The rank of a stack, and its size in bytes."""

    rank: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Rebuild:
    """The cost of repeating stages 2 and 3 with the bank's settings.

    ``forward`` counts passes over the shots without a backward pass, ``trained`` those with one. ``targets`` are the
    target tokens of the shots, from the state's losses. ``tokens`` of all shots and ``operations`` are estimates (our
    choice: four characters per token), None if the history is not stored or the base's shapes are not available
    locally. ``seconds`` are for ``machine``, which is this machine.
    """

    forward: float
    trained: float
    targets: int | None
    tokens: float | None
    operations: float | None
    seconds: float | None
    machine: str


@dataclass(frozen=True, slots=True)
class Summary:
    """A summary of what is stored for a person.

    ``weights`` are sorted, the largest first. ``null`` is the posterior's weight of the pooled model, None for other
    policies. ``history`` counts the items stored by opt-in. ``trained`` names the parts of the bank that were trained
    on this person, None if the bank has no list of members.
    """

    version: int
    versions: int
    time: str | None
    bank: str
    bank_here: str
    policy: str
    mode: str
    weights: list[Weight]
    null: float | None
    stack: Stack | None
    losses: Losses | None
    history: int | None
    exports: list[Export]
    trained: list[str] | None
    bytes: int
    rebuild: Rebuild | None


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a person: its size, work key, and policy (None for a damaged version)."""

    version: int
    bytes: int
    work: str | None
    policy: str | None
    latest: bool


def summarize(id: str, store: Store, bank: Path) -> Summary:
    """Return the summary of a person in ``store``, with respect to the bank in a folder.

    Raises PersonNotFound, StateCorrupt, BankCorrupt.
    """
    info = read_info(bank)
    version = store.latest(id)
    state, kept = store.load(id, version), store.history(id)
    stack = state.stack
    return Summary(
        version=version or 0,
        versions=len(store.versions(id)),
        time=store.time_of(id, version or 0),
        bank=state.bank,
        bank_here=info.hash,
        policy=state.policy,
        mode=state.mode,
        weights=sorted(map(Weight, state.anchors, state.w), key=lambda weight: -weight.w),
        null=1 - sum(state.w) / info.run.merge.scale if state.policy == "posterior" else None,
        stack=Stack(stack.rank, sum(tensor.nbytes for tensor in stack.tensors().values())) if stack else None,
        losses=state.losses,
        history=len(kept.items) if kept else None,
        exports=store.exports.of(id),
        trained=info.members.artefacts_of(id) if info.members.hashed else None,
        bytes=store.nbytes(id),
        rebuild=_rebuild(state, info, kept),
    )


def versions_of(id: str, store: Store) -> list[Version]:
    """Return all versions of a person, oldest first. Raises PersonNotFound if there are none."""
    sizes = store.sizes(id)
    if not sizes:
        store.load(id)  # raises PersonNotFound
    found = []
    for number, size in sizes.items():
        content: tuple[str | None, str | None] = None, None
        with contextlib.suppress(StateCorrupt, PersonNotFound):  # damaged, or removed meanwhile
            state = store.load(id, number)
            content = state.work, state.policy
        found.append(Version(number, size, *content, latest=number == max(sizes)))
    return found


def gains(losses: Losses) -> list[str]:
    """Return sentences on how much merge and stack change the losses on the person's own shots."""
    sentences = [f"the merge {_compared(losses.pooled - losses.merged)} than the pooled model"]
    if losses.stacked is not None:
        sentences.append(f"merge and stack {_compared(losses.merged - losses.stacked)} than the merge alone")
    return sentences


def _compared(gain: float) -> str:
    return f"predicts their shots {'better' if gain >= 0 else 'worse'} by {abs(gain):.3f} nats per token"


def _rebuild(state: State, info: BankInfo, kept: Person | None) -> Rebuild | None:
    """Return the cost for the stored history, or for the shots with known losses; None without either."""
    same = kept is None or kept.digest() == state.history
    targets = state.losses.tokens if state.losses and same else None
    run = _as_made(state, info)
    lengths = _tokens(kept, Task.model_validate(info.task)) if kept else None
    if not kept or not lengths:
        return Rebuild(*passes(run, 1), targets, None, None, None, "") if targets else None
    shots, answers = len(kept.items), targets or lengths[1]
    load = Load(tokens=(lengths[0] + answers) / shots, targets=answers / shots, shots=shots)
    done, tokens, operations = passes(run, shots), load.tokens * shots, _operations(run, load)
    if operations is None:
        return Rebuild(*done, targets, tokens, None, None, "")
    machine = hardware("this")
    return Rebuild(*done, targets, tokens, operations, machine.seconds(operations), machine.name)


def _as_made(state: State, info: BankInfo) -> Run:
    """Return the bank's settings with the state's policy, anchors, and stack."""
    k, anchors = len(state.anchors), len(info.items)
    words = [f"bank.anchors={anchors}", f"merge.policy={state.policy}", f"merge.k={k if k < anchors else 0}"]
    words.append(f"stack.enabled={state.stack is not None}")
    if state.stack is not None:
        words.append(f"stack.lora.rank={state.stack.rank}")
    return override(info.run, words)


def _tokens(person: Person, task: Task) -> tuple[float, float] | None:
    """Return the approximate tokens of prompts and of answers (with end tokens), estimated from characters.

    None if there are no items, or items of another task than the bank's.
    """
    with contextlib.suppress(DataError):
        prompts = sum(len(task.prompt(item)) for item in person.items)
        answers = sum(len(task.target(item)) for item in person.items)
        return (prompts / _CHARACTERS, answers / _CHARACTERS + len(person.items)) if person.items else None
    return None


def _operations(run: Run, load: Load) -> float | None:
    """Return the operations for one person; None if the base's shapes are not available locally."""
    with contextlib.suppress(ConfigError):
        if run.base in KNOWN or Path(run.base).is_dir():  # an asset or a hub model might need a download
            return costs(Shape.of(run.base), run, load)["MTA"].person_operations
    return None
