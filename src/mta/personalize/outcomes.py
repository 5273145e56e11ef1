"""What a call of ``personalize`` or ``update`` reports: counts of people, and the errors of people without a state."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from mta.errors import MtaError


@dataclass(frozen=True, slots=True)
class Personalized:
    """Counts of ``personalize``: people trained, people up to date, and texts that were shortened.

    ``failed`` maps ids to errors: items that do not fit the model's tokens, or made workers fail, training that
    diverged, or a newer state of another process. ``plan`` is a digest of the cohorts. ``forgotten`` are ids of people
    who were forgotten after their items were read: they have no new state.
    """

    trained: int
    unchanged: int
    shortened: int
    failed: dict[str, MtaError] = field(default_factory=dict)
    plan: str = field(default="", compare=False)
    forgotten: tuple[str, ...] = ()

    def __str__(self) -> str:
        up = f"{self.trained} people personalized, {self.unchanged} were up to date"
        return f"{up}; {self.shortened} texts were shortened{_failures(self)}"


@dataclass(frozen=True, slots=True)
class Updated:
    """Counts of ``update``: actions for people with new items (``mta.personalize.update``), people begun, unchanged.

    ``refreshed`` people have new coefficients, by the actions ``merge`` and ``refresh``.
    ``ahead`` are ids of people whose states were made from more items than were given: these were kept.
    """

    kept: int
    retrained: int
    refreshed: int
    begun: int
    unchanged: int
    failed: dict[str, MtaError] = field(default_factory=dict)
    plan: str = field(default="", compare=False)
    forgotten: tuple[str, ...] = ()
    ahead: tuple[str, ...] = ()

    def __str__(self) -> str:
        new = f"{self.kept} kept, {self.retrained} retrained, {self.refreshed} refreshed"
        begun = f"{self.begun} personalized anew, {self.unchanged} had no new items"
        return f"of people with new items {new}; {begun}{_failures(self)}"


def _failures(done: Personalized | Updated) -> str:
    return f"; {len(done.failed)} failed" if done.failed else ""


def as_json(done: Personalized | Updated) -> dict[str, Any]:
    """Return all fields for a JSON file, each error as its text."""
    values = {one.name: getattr(done, one.name) for one in fields(done)}
    return values | {"failed": {id: str(error) for id, error in done.failed.items()}}


def counts(done: Personalized | Updated) -> dict[str, int]:
    """Return the counts, without ids."""
    values = {name: value for name, value in as_json(done).items() if name != "plan"}
    return {name: value if isinstance(value, int) else len(value) for name, value in values.items()}
