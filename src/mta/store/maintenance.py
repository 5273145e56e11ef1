"""Looking after a store: whether all of it reads, how much there is, and what may go.

Files are called by their names below the store's root, in which no id stands.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from mta.errors import MtaError
from mta.store.exports import check_exports
from mta.store.lock import LOCK
from mta.store.state import State, history_from_bytes
from mta.store.store import Store, version_of
from mta.store.tombstones import FOLDER
from mta.store.workspace import ABANDONED

T = TypeVar("T")
Kind = Literal["key", "state", "history", "exports", "hint", "work", "tombstone", "lock", "leftover", "stranger"]

_PLACE = re.compile(r"([0-9a-f]{2}/[0-9a-f]{64})/([^/]+)")
_BESIDE: dict[str, Kind] = {"latest.json": "hint", "history.json": "history", "exports.json": "exports"}
_ASIDE = re.compile(r"\..+\.[0-9a-f]{32}")  # what a writer renames or links when it is whole
_READERS: dict[Kind, Callable[[bytes, str], object]] = {
    "state": State.from_bytes,
    "history": partial(history_from_bytes, "-"),
    "exports": check_exports,
}
_TOGETHER = 16  # files read at once: an address far away answers each of them slowly


@dataclass(frozen=True, slots=True)
class Health:
    """What ``check`` found. ``damaged``: files and what is wrong with them; the others are looked at by no reader."""

    people: int
    states: int
    histories: int
    exports: int  # lists of where adapters were exported to
    damaged: dict[str, str]
    leftovers: list[str]
    strangers: list[str]
    exposed: str  # the command that keeps others out, where others can read the files


@dataclass(frozen=True, slots=True)
class Stats:
    """How much a store holds. Bytes of a person: all versions, history, hint, exports."""

    people: int
    versions: int
    histories: int
    bytes: int
    bytes_per_person: float
    median_bytes: float
    most_bytes: int


def check(store: Store, on_file: Callable[[int, int], None] = lambda done, total: None) -> Health:
    """Read every state, history and list of exports of a store; ``on_file`` is told how many are done, of how many.

    Raises StoreError where there is no store.
    """
    store.check()
    kinds = {name: _kind(name) for name in store.files.find()}
    read = [name for name, kind in kinds.items() if kind in _READERS]
    damaged: dict[str, str] = {}
    for n, (name, wrong) in enumerate(zip(read, _together(lambda name: _wrong(store, name), read)), 1):
        if wrong:
            damaged[name] = wrong
        on_file(n, len(read))

    def of(kind: Kind) -> list[str]:
        return sorted(name for name, its in kinds.items() if its == kind and name not in damaged)

    people = {_person(name) for name in of("state")}
    states, histories, exports = len(of("state")), len(of("history")), len(of("exports"))
    left = of("leftover"), of("stranger")
    return Health(len(people), states, histories, exports, damaged, *left, store.files.exposed())


def stats(store: Store) -> Stats:
    """Count and weigh by one listing; nothing is read. Raises StoreError where there is no store."""
    store.check()
    sizes, kinds = dict[str, int](), list[Kind]()
    for name, size in store.files.find().items():
        if (kind := _kind(name)) in (*_READERS, "hint"):
            kinds.append(kind)
            sizes[_person(name)] = sizes.get(_person(name), 0) + size
    each = sorted(sizes.values()) or [0]
    weights = sum(each), statistics.mean(each), statistics.median(each), each[-1]
    return Stats(len(sizes), kinds.count("state"), kinds.count("history"), *weights)


def collect(
    store: Store,
    keep: int | None = None,
    older: float = 3600.0,
    dry: bool = False,
    on_person: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int]:
    """Remove what killed writers left ``older`` seconds ago, and with ``keep`` all but everybody's newest versions.

    What a stopped run left is removed after a week without changes, and so are expired tombstones.

    Somebody whose newest version does not read keeps all of them. Returns the files that went (with ``dry``: that would
    go) and their bytes. Repeat it if it was interrupted. Raises StoreError where there is no store.
    """
    store.check()
    sizes, gone = store.files.find(), dict[str, int]()
    waits: dict[Kind, float] = {"leftover": older, "work": ABANDONED}
    left = {name: waits[kind] for name in sizes if (kind := _kind(name)) in waits}
    old = [name for name in store.tombstones.expired(dry) if name in sizes]
    for name in [*old, *(name for name, wait in left.items() if store.files.age(name) > wait)]:
        gone[name] = sizes[name]
        if not dry:
            store.files.remove(name)
    numbers = Counter(_person(name) for name in sizes if _kind(name) == "state")
    many = [person for person, count in numbers.items() if keep and count > keep]
    for n, went in enumerate(_together(lambda person: _trimmed(store, person, keep or 0, dry), many), 1):
        gone |= went
        on_person(n, len(many))
    return gone


def _trimmed(store: Store, person: str, keep: int, dry: bool) -> dict[str, int]:
    """Remove one person's older versions, oldest first: what an interruption leaves has no gaps.

    Their folder is listed again: since the whole was, they may have been forgotten and have begun with 1 once more.
    """
    versions = {version: size for name, size in store.files.sizes(person).items() if (version := version_of(name))}
    names = {f"{person}/{version}.safetensors": versions[version] for version in sorted(versions)}
    if not names or _wrong(store, list(names)[-1]):
        return {}
    going = dict(list(names.items())[:-keep])
    for name in [] if dry else going:
        store.files.remove(name)
    return going


def _together(work: Callable[[str], T], names: Sequence[str]) -> Iterator[T]:
    """What ``work`` gives for each name, in their order, a few at once."""
    with ThreadPoolExecutor(_TOGETHER, "mta-upkeep") as pool:
        for start in range(0, len(names), 16 * _TOGETHER):
            yield from pool.map(work, names[start : start + 16 * _TOGETHER])


def _kind(name: str) -> Kind:
    file = _file(name)
    if _ASIDE.fullmatch(file):
        return "leftover"
    if name.startswith("work/"):
        return "work"  # a stopped run goes on from it
    if name == "store.json":
        return "key"
    if name == LOCK:
        return "lock"
    if name.startswith(f"{FOLDER}/"):
        return "tombstone"
    if not _PLACE.fullmatch(name):
        return "stranger"
    return "state" if version_of(file) else _BESIDE.get(file, "stranger")


def _wrong(store: Store, name: str) -> str:
    """What keeps a file from being read; nothing for one that was removed meanwhile."""
    try:
        data = store.files.read(name)
        if data is not None:
            _READERS[_kind(name)](data, name)
    except MtaError as error:
        return error.message
    return ""


def _person(name: str) -> str:
    return name.rpartition("/")[0]


def _file(name: str) -> str:
    return name.rpartition("/")[2]
