"""Split people into disjoint parts, one per stage, and save the splits without raw ids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mta.data.history import Person, check_distinct
from mta.errors import DataError, InputError
from mta.system.atomic import json_sha256, read_json, write_json

Part = Literal["task", "development", "candidates", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
TESTED = ("test", "development")
SCHEMA = 1
log = logging.getLogger("mta")


@dataclass(frozen=True, slots=True)
class Splits:
    """Ids of four sets of people: task LoRA training, development, anchor candidates, and test."""

    task: tuple[str, ...]
    development: tuple[str, ...]
    candidates: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        every = [id for part in PARTS for id in getattr(self, part)]
        if len(set(every)) < len(every):
            raise InputError(
                "splits must be disjoint: a person is in them twice",
                hint="Give every person once:  Splits(task, development, candidates, test)",
            )

    @property
    def digest(self) -> str:
        """Sha256 over the ids of every part; the same splits give the same digest in any process."""
        return json_sha256([SCHEMA, *(list(getattr(self, part)) for part in PARTS)])

    def select(self, part: Part, people: Iterable[Person]) -> list[Person]:
        """Return the people of one part in its order. Raises InputError if a person is missing."""
        by_id, ids = {person.id: person for person in people}, getattr(self, part)
        if missing := [id for id in ids if id not in by_id]:
            raise InputError(
                f"{len(missing)} of {len(ids)} people of part {part!r} are not among those given",
                hint="Give all the people the splits were drawn from.",
            )
        return [by_id[id] for id in ids]

    def save(self, path: str | Path) -> None:
        """Write the splits as JSON. Ids are hashed with the digest as salt, so the same splits give the same bytes.

        Raises DataError if the file exists with other content: results beside it are of other splits.
        """
        path, salt = Path(path), self.digest
        parts: dict[str, list[str]] = {part: [json_sha256([salt, id]) for id in getattr(self, part)] for part in PARTS}
        content = {"schema": SCHEMA, "digest": salt, **parts}
        if path.exists() and read_json(path) != content:
            raise DataError(
                f"{path} holds other splits (of other people, sizes, shots, queries, or seed), or was changed",
                hint="Choose another folder with --out. If people who share items were in different parts, "
                "people.together=false in a recipe splits as before.",
            )
        write_json(path, content)


def draw(
    people: Sequence[Person],
    seed: int,
    *,
    task: int,
    development: int,
    test: int,
    candidates: int | None = None,
    min_items: int = 1,
    together: bool = True,
) -> Splits:
    """Draw disjoint parts of the given sizes from people with at least ``min_items`` items.

    ``candidates`` defaults to the rest. The parts depend only on seed and ids, not on the order of ``people``. The test
    part is drawn first, so it does not depend on the sizes of the others. People of one ``group`` stay in one part, so
    sizes may differ from those requested, which is logged; ``together=False`` ignores groups.
    Raises InputError if there are too few people, or if the groups leave a part empty.
    """
    sizes = {"test": test, "development": development, "task": task, "candidates": candidates or 0}
    fit = [person for person in people if len(person.items) >= min_items]
    check_distinct(fit)
    ids = [person.id for person in fit]
    if len(ids) < (asked := sum(sizes.values())):
        parts_asked = ", ".join(f"{name} {size}" for name, size in sizes.items() if size)
        raise InputError(
            f"{asked} people were requested ({parts_asked}), "
            f"but only {len(ids)} of the {len(people)} given qualify (min_items={min_items})",
            hint="Ask for fewer people, or lower min_items.",
        )
    fit = _in_order(fit, seed)
    left = _grouped(fit) if together else [[person.id] for person in fit]
    most, parts = max(map(len, left), default=0), dict[str, tuple[str, ...]]()
    for name, size in sizes.items():
        rest = candidates is None and name == "candidates"  # all remaining groups
        taken = left if rest else _fill(left, size, tested=name in TESTED)
        parts[name] = tuple(id for group in taken for id in group)
        placed = {group[0] for group in taken}
        left = [group for group in left if group[0] not in placed]
        _check_size(name, len(parts[name]), size, most)
    return Splits(**parts)


def set_aside(
    people: Sequence[Person], seed: int, count: int, able: Callable[[Person], bool]
) -> tuple[list[Person], list[Person]]:
    """Draw ``count`` people who are ``able``; return them, and the people who share nothing with them.

    People of one group are drawn together, so there may be fewer, which is logged. Raises InputError.
    """
    if not count:
        return [], [*people]
    fit = _in_order([person for person in people if able(person)], seed)
    groups = _fill(_grouped(fit), count, tested=True)
    chosen = {id for group in groups for id in group}
    if len(fit) < count or not chosen:
        reason = "those share items in larger groups" if len(fit) >= count else f"only {len(fit)} have enough items"
        raise InputError(
            f"{count} of {len(people)} people were to be held out, but {reason}",
            hint="Hold out another number of people, or put some into a file of their own, for  mta compare FILE",
        )
    if len(chosen) < count:
        log.warning("%d people are held out, not %d: people who share items stay together", len(chosen), count)
    shared = {person.group for person in fit if person.id in chosen and person.group}
    outside = [person for person in fit if person.id in chosen]
    return outside, [person for person in people if person.id not in chosen and person.group not in shared]


def _in_order(people: Sequence[Person], seed: int) -> list[Person]:
    """Return people in the order of the draw, which depends on the seed and their ids only."""
    return sorted(people, key=lambda person: json_sha256([seed, person.id]))


def _grouped(people: Sequence[Person]) -> list[list[str]]:
    """Return ids by group, in the order of each group's first person; a person without a group is alone."""
    groups: dict[tuple[bool, str], list[str]] = {}
    for person in people:
        groups.setdefault((bool(person.group), person.group or person.id), []).append(person.id)
    return list(groups.values())


def _fill(groups: Sequence[list[str]], size: int, *, tested: bool) -> list[list[str]]:
    """Choose whole groups for a part: for tests in their order, none larger than a quarter (or two people).

    A group counts as one observation. Training parts take the largest groups first, and up to a quarter too many.
    """
    order = groups if tested else sorted(groups, key=len, reverse=True)  # stable: single people keep their order
    most = max(size // 4, 2)  # of one group in a test
    taken: list[list[str]] = []
    free = size
    for group in order:
        if free > 0 and len(group) <= (min(free, most) if tested else free + size // 4):
            taken.append(group)
            free -= len(group)
    return taken


def _check_size(name: str, got: int, asked: int, most: int) -> None:
    """Log a part that has another size than requested because of groups. Raises InputError if the part is empty."""
    if asked and not got:
        raise InputError(
            f"{asked} people were requested ({name}), but the remaining people are connected by shared items "
            f"in groups of up to {most} people that do not fit",
            hint="Ask for more people, or let parts share items: together=False (in a recipe: people.together=false).",
        )
    if asked and got != asked:
        log.warning("%s: %d people instead of %d, because people who share items stay together", name, got, asked)
