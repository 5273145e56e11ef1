"""What is to be computed: a person, a cohort of people, and the key of each result."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from mta.bank.bank import Bank
from mta.config import Run
from mta.config.loader import to_yaml
from mta.data.history import Person
from mta.model.base import BaseModel
from mta.store.state import State, state_key
from mta.system.atomic import json_sha256


@dataclass(frozen=True, slots=True)
class StateInputs:
    """What a state depends on beside a person's items: the bank's hash, the settings that affect it, and the seed."""

    bank: str
    settings: str
    seed: int

    @classmethod
    def of(cls, base: BaseModel, bank: Bank, run: Run) -> StateInputs:
        """Return the inputs of states that are made with these."""
        kept = {"merge": run.merge.model_dump(mode="json"), "stack": run.stack.model_dump(mode="json")}
        settings = to_yaml(kept | {"dtype": str(base.dtype), "max_tokens": base.prompts.max_tokens})
        return cls(bank.hash, settings, run.seed)

    @property
    def digest(self) -> str:
        """A hash of settings and seed. ``update`` makes a state anew whose hash differs."""
        return hashlib.sha256(f"{self.seed}\n{self.settings}".encode()).hexdigest()

    def key(self, history: str, earlier: State | None) -> str:
        """Return the key of the state of a history (digest), anew or from an ``earlier`` state."""
        settings = self.settings + (f"after: {earlier.work}\n" if earlier else "")
        return state_key(self.bank, history, settings, self.seed)


@dataclass(frozen=True, slots=True)
class WorkItem:
    """A person, and the work key of the state to compute for them.

    An update continues from the ``earlier`` state, which was made from the first ``known_items`` of the person's items.
    Where a store has it, it comes without its stack (``worker.py`` loads that). ``version`` is the person's newest in
    the store when the work was planned, 0 for none.
    """

    person: Person
    work: str
    earlier: State | None = None
    known_items: int = 0
    version: int = 0

    @property
    def new_items(self) -> Person:
        """The person with only the items that their state does not hold yet."""
        return Person(self.person.id, self.person.items[self.known_items :]) if self.known_items else self.person

    @property
    def items_in_stack(self) -> int:
        """The number of items that the earlier stack was trained on."""
        return self.known_items - (self.earlier.untrained if self.earlier else 0)

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
        return [item.person for item in self.items]

    @property
    def earlier_states(self) -> list[State]:
        return [item.earlier for item in self.items if item.earlier]

    @property
    def digest(self) -> str:
        """Name of the work, so that a checkpoint of another cohort is not used."""
        works = [item.work for item in self.items]
        return json_sha256([works, self.tokens_per_batch, self.threads])

    def halves(self) -> tuple[Cohort, ...]:
        """Return the cohort in two parts; empty for one person."""
        middle = len(self) // 2
        return tuple(replace(self, items=part) for part in (self.items[:middle], self.items[middle:]) if middle)
