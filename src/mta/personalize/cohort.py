"""Units of work for stages 2 and 3: one person's state to compute, and cohorts of people who are computed together."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

from mta.bank.bank import Bank
from mta.config import Run
from mta.config.loader import to_yaml
from mta.data.history import Person
from mta.model.base import BaseModel
from mta.store.state import State, work_key


@dataclass(frozen=True, slots=True)
class WorkItem:
    """A person, and the work key of the state to compute for them.

    An update starts from the state ``before``, which holds what the first ``known`` items say. The stack of ``before``
    may be missing if a store has it as ``version``.
    """

    person: Person
    work: str
    before: State | None = None
    known: int = 0
    version: int = 0

    @classmethod
    def of(
        cls, person: Person, bank: Bank, settings: str, seed: int, before: State | None = None, known: int = 0
    ) -> WorkItem:
        """Return the work for a person's items with this bank and ``settings_of`` a run, anew or from ``before``."""
        how = settings + (f"after: {before.work}\n" if before else "")
        return cls(person, work_key(bank.hash, person.digest(), how, seed), before, known)

    @property
    def shots(self) -> Person:
        """The person with only the items that their state does not hold yet."""
        return Person(self.person.id, self.person.items[self.known :])

    @property
    def name(self) -> str:
        """Name of the work in a file. Only a reader who has the texts can confirm a guessed id from it."""
        return hashlib.sha256(f"{self.work}/{self.person.id}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Cohort:
    """People who are computed together, in rows of at most ``tokens_per_batch``."""

    items: tuple[WorkItem, ...]
    tokens_per_batch: int
    threads: int

    def __len__(self) -> int:
        return len(self.items)

    @property
    def people(self) -> list[Person]:
        """The people, with their whole histories."""
        return [item.person for item in self.items]

    @property
    def befores(self) -> list[State]:
        """The states that an update starts from."""
        return [item.before for item in self.items if item.before]

    @property
    def digest(self) -> str:
        """Name of the work, so that a checkpoint of another cohort is not used."""
        works = [item.work for item in self.items]
        return hashlib.sha256(json.dumps([works, self.tokens_per_batch, self.threads]).encode()).hexdigest()

    def halves(self) -> tuple[Cohort, ...]:
        """Return the cohort in two parts; empty for one person."""
        middle = len(self) // 2
        return tuple(replace(self, items=part) for part in (self.items[:middle], self.items[middle:]) if middle)


def settings_of(base: BaseModel, run: Run) -> str:
    """Return all settings that affect a state, as text."""
    kept = {"merge": run.merge.model_dump(mode="json"), "stack": run.stack.model_dump(mode="json")}
    return to_yaml(kept | {"dtype": str(base.dtype), "max_tokens": base.prompts.max_tokens})


def digest_of(settings: str, seed: int) -> str:
    """Return a hash of the settings that affect a state. ``update`` refuses a state whose hash differs."""
    return hashlib.sha256(f"{seed}\n{settings}".encode()).hexdigest()
