"""The states of people: in a store, or in memory where there is no store."""

from __future__ import annotations

from dataclasses import dataclass, field

from mta.bank.bank import Bank
from mta.errors import OtherBank, PersonNotFound, StateCorrupt
from mta.store import Store
from mta.store.state import State

UNUSABLE = (PersonNotFound, StateCorrupt, OtherBank)  # states that are computed anew


@dataclass(frozen=True, slots=True)
class States:
    """Finds the states that were made with one bank. ``unsaved`` holds the states that are in no store."""

    bank: Bank
    store: Store | None
    unsaved: dict[str, State] = field(default_factory=dict)

    def get(self, person: str) -> State:
        """Return a person's state. Raises PersonNotFound, StateCorrupt, OtherBank."""
        if person in self.unsaved:
            return self.unsaved[person]
        if not self.store:
            raise PersonNotFound("no state is known for that person", hint="Call personalize for them first.")
        state = self.store.load(person)
        if state.bank != self.bank.hash:
            raise OtherBank(
                f"the person's state was made with bank {state.bank[:8]}…, "
                f"the bank at {self.bank.folder} is {self.bank.hash[:8]}…",
                hint="Open that bank, or personalize again: mta personalize",
            )
        return state

    def has(self, person: str, work: str) -> bool:
        """Return whether a person's state has this work key."""
        try:
            return self.get(person).work == work
        except UNUSABLE:
            return False
