"""Maintenance of a store: check and count all files, and remove old ones.

Files are named relative to the store's root; the names contain no ids.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from mta.errors import MtaError
from mta.store.exports import exports_from_bytes, remove_if_empty
from mta.store.run_checkpoints import FOLDER as WORK
from mta.store.run_checkpoints import RUN
from mta.store.state import State, history_from_bytes
from mta.store.store import Store, version_of
from mta.store.tombstones import FOLDER, LIFETIME
from mta.system.storage import LOCK, in_threads

_PERSON = "[0-9a-f]{2}/[0-9a-f]{64}"
_KINDS = {  # kind of a file -> pattern of its names; the first match counts, and other files are strangers
    "state": rf"{_PERSON}/[1-9][0-9]*\.safetensors",
    "history": rf"{_PERSON}/history\.json",
    "exports": rf"{_PERSON}/exports\.json",
    "leftover": r"(.*/)?\.[^/]+\.[0-9a-f]{32}",  # temporary files, which a writer renames or links when complete
    "work": f"{WORK}/{RUN}/.+",  # a stopped run resumes from it
    "key": r"store\.json",
    "lock": re.escape(LOCK),
    "tombstone": f"{FOLDER}/.+",
}
_READERS: dict[str, Callable[[bytes, str], object]] = {
    "state": State.from_bytes,
    "history": partial(history_from_bytes, "-"),
    "exports": exports_from_bytes,
}


@dataclass(frozen=True, slots=True)
class Health:
    """The result of ``check``. ``damaged``: file -> error. mta never reads ``leftovers`` and ``strangers``."""

    people: int
    states: int
    histories: int
    exports: int  # lists of exported adapters
    bytes: int  # of all states, histories, and lists
    damaged: dict[str, str]
    leftovers: list[str]
    strangers: list[str]
    banks: dict[str, int]  # hash of a bank -> people whose newest state is of it
    exposed: str  # if others can read the files, the command that prevents it


def check(store: Store, on_file: Callable[[int, int], None] = lambda done, total: None) -> Health:
    """Read every state, history, and list of exports of a store; call ``on_file`` with the numbers done and in total.

    Raises StoreError if there is no store.
    """
    store.check()
    sizes = store.files.find()
    kinds = {name: _kind(name) for name in sizes}
    read = [name for name, kind in kinds.items() if kind in _READERS]
    damaged, newest = dict[str, str](), dict[str, tuple[int, str]]()  # person -> version and its bank
    for n, (name, (wrong, bank)) in enumerate(zip(read, in_threads(lambda name: _examined(store, name), read)), 1):
        if wrong:
            damaged[name] = wrong
        elif bank:
            person, _, file = name.rpartition("/")
            newest[person] = max(newest.get(person, (0, "")), (version_of(file), bank))
        on_file(n, len(read))
    whole = defaultdict[str, list[str]](list)
    for name in sorted(kinds.keys() - damaged):
        whole[kinds[name]].append(name)
    return Health(
        people=len({_folder(name) for name in whole["state"]}),
        states=len(whole["state"]),
        histories=len(whole["history"]),
        exports=len(whole["exports"]),
        bytes=sum(sizes[name] for name in read),
        damaged=damaged,
        leftovers=whole["leftover"],
        strangers=whole["stranger"],
        banks=dict(Counter(bank for _, bank in newest.values())),
        exposed=store.files.exposed(),
    )


def collect(
    store: Store, keep: int | None = None, dry: bool = False, on_person: Callable[[int, int], None] = lambda *_: None
) -> dict[str, int]:
    """Remove temporary files of an hour ago and, with ``keep``, all but each person's newest versions.

    Also removes runs that stopped a week ago, and expired tombstones. If a person's newest version is damaged, all of
    that person's versions are kept. Returns the removed files (with ``dry``: the files to remove) and their bytes. An
    interrupted call can be repeated. Raises StoreError if there is no store.
    """
    store.check()
    sizes = store.files.find()
    kinds = {name: _kind(name) for name in sizes}
    now = datetime.now(UTC)
    ages = {
        name: (now - (store.files.time(name) or now)).total_seconds()
        for name, kind in kinds.items()
        if kind in ("leftover", "work")
    }
    running = {_folder(name) for name, age in ages.items() if kinds[name] == "work" and age <= LIFETIME}
    old = [name for name in store.tombstones.expired() if name in sizes]
    old += [
        name
        for name, age in ages.items()
        if (age > 3600 if kinds[name] == "leftover" else _folder(name) not in running)  # a run's latest file counts
    ]
    removed = {name: sizes[name] for name in old}
    if not dry:
        for name in old:
            store.files.remove(name)
        for folder in {_folder(name) for name in old} - {""}:
            remove_if_empty(store.files, folder)
    numbers = Counter(_folder(name) for name in sizes if kinds[name] == "state")
    many = [person for person, count in numbers.items() if keep and count > keep]
    for n, trimmed in enumerate(in_threads(lambda person: _trimmed(store, person, keep or 0, dry), many), 1):
        removed |= trimmed
        on_person(n, len(many))
    return removed


def _trimmed(store: Store, person: str, keep: int, dry: bool) -> dict[str, int]:
    """Remove one person's older versions, oldest first, so that an interruption leaves no gaps.

    The folder is listed again, because the person may have been forgotten and started again at version 1 meanwhile.
    """
    sizes = store.files.sizes(person)
    versions = sorted(filter(version_of, sizes), key=version_of)
    if not versions or _examined(store, f"{person}/{versions[-1]}")[0]:
        return {}
    older = {f"{person}/{name}": sizes[name] for name in versions[:-keep]}
    if not dry:
        for name in older:
            store.files.remove(name)
    return older


def _kind(name: str) -> str:
    return next((kind for kind, pattern in _KINDS.items() if re.fullmatch(pattern, name)), "stranger")


def _examined(store: Store, name: str) -> tuple[str, str]:
    """Return the error of reading a file ("" if it is intact or was removed meanwhile), and a state's bank."""
    try:
        data = store.files.read(name)
        content = None if data is None else _READERS[_kind(name)](data, name)
    except MtaError as error:
        return error.message, ""
    return "", content.bank if isinstance(content, State) else ""


def _folder(name: str) -> str:
    return name.rpartition("/")[0]
