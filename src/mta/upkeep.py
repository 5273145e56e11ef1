"""Looking after a store: whether all of it reads, how much there is, and what may go.

Files are called by their names below the store's root, in which no id stands.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from mta.errors import MtaError
from mta.state import State, history_from_bytes
from mta.store import Store, version_of

Kind = Literal["state", "history", "hint", "work", "leftover", "stranger"]

_PLACE = re.compile(r"([0-9a-f]{2}/[0-9a-f]{64})/([^/]+)")
_ASIDE = re.compile(r"\..+\.[0-9a-f]{32}")  # what a writer renames or links when it is whole
_TOGETHER = 16  # files read at once: an address far away answers each of them slowly


@dataclass(frozen=True, slots=True)
class Health:
    """What ``check`` found. ``damaged``: files and what is wrong with them; the others are looked at by no reader."""

    people: int
    states: int
    histories: int
    damaged: dict[str, str]
    leftovers: list[str]
    strangers: list[str]


@dataclass(frozen=True, slots=True)
class Stats:
    """How much a store holds. Bytes of a person: all versions, history, hint."""

    people: int
    versions: int
    histories: int
    bytes: int
    bytes_per_person: float
    median_bytes: float
    most_bytes: int


def check(store: Store, on_file: Callable[[int, int], None] = lambda done, total: None) -> Health:
    """Read every state and history of a store; ``on_file`` is told how many are done, of how many.

    Raises StoreError where there is no store.
    """
    store.check()
    kinds = {name: _kind(name) for name in store.files.find()}
    read = [name for name, kind in kinds.items() if kind in ("state", "history")]
    damaged: dict[str, str] = {}
    with ThreadPoolExecutor(_TOGETHER, "mta-check") as pool:
        for n, (name, wrong) in enumerate(zip(read, pool.map(lambda name: _wrong(store, name), read)), 1):
            damaged |= {name: wrong} if wrong else {}
            on_file(n, len(read))

    def of(kind: Kind) -> list[str]:
        return sorted(name for name, its in kinds.items() if its == kind and name not in damaged)

    people = {_person(name) for name in of("state")}
    return Health(len(people), len(of("state")), len(of("history")), damaged, of("leftover"), of("stranger"))


def stats(store: Store) -> Stats:
    """Count and weigh by one listing; nothing is read. Raises StoreError where there is no store."""
    store.check()
    sizes, kinds = dict[str, int](), list[Kind]()
    for name, size in store.files.find().items():
        if _PLACE.fullmatch(name):
            kinds.append(_kind(name))
            sizes[_person(name)] = sizes.get(_person(name), 0) + size
    each = sorted(sizes.values()) or [0]
    weights = sum(each), statistics.mean(each), statistics.median(each), each[-1]
    return Stats(len(sizes), kinds.count("state"), kinds.count("history"), *weights)


def collect(store: Store, keep: int | None = None, older: float = 3600.0, dry: bool = False) -> dict[str, int]:
    """Remove what killed writers left ``older`` seconds ago, and with ``keep`` all but everybody's newest versions.

    Returns the files that went (with ``dry``: that would go) and their bytes. Repeat it if it was interrupted. Raises
    StoreError where there is no store.
    """
    store.check()
    sizes = store.files.find()
    going = [name for name in sizes if _kind(name) == "leftover" and store.files.age(name) > older]
    going += _beyond(keep, [name for name in sizes if _kind(name) == "state"]) if keep else []
    for name in [] if dry else going:
        store.files.remove(name)
    return {name: sizes[name] for name in going}


def _beyond(keep: int, states: Sequence[str]) -> Iterator[str]:
    """All but everybody's newest versions, oldest first: what an interruption leaves has no gaps."""
    versions: dict[str, list[int]] = {}
    for name in states:
        versions.setdefault(_person(name), []).append(version_of(_file(name)))
    for person, numbers in versions.items():
        yield from (f"{person}/{number}.safetensors" for number in sorted(numbers)[:-keep])


def _kind(name: str) -> Kind:
    file = _file(name)
    if name.startswith("work/"):
        return "work"  # a stopped run goes on from it
    if _ASIDE.fullmatch(file):
        return "leftover"
    if name == "store.json" or (_PLACE.fullmatch(name) and file == "latest.json"):
        return "hint"
    if _PLACE.fullmatch(name) and file == "history.json":
        return "history"
    return "state" if _PLACE.fullmatch(name) and version_of(file) else "stranger"


def _wrong(store: Store, name: str) -> str:
    """What keeps a file from being read; nothing for one that was removed meanwhile."""
    try:
        data = store.files.read(name)
        if data is not None and _kind(name) == "state":
            State.from_bytes(data, name)
        elif data is not None:
            history_from_bytes("-", data, name)
    except MtaError as error:
        return error.message
    return ""


def _person(name: str) -> str:
    return name.rpartition("/")[0]


def _file(name: str) -> str:
    return name.rpartition("/")[2]
