"""Keys and values of the rows being decoded: a slot each, which is kept after an answer for who goes on from there.

    slots   0 ......... used ................ count
            at work      warm or empty, whoever was here longest ago goes first

Slots at work lie together, so a pass over some of them reads a stretch of memory and nothing is gathered. When a row
leaves, the last one at work changes places with it. A warm slot is used again only by the same *owner* (person, version
and mode, and whoever asked): what was computed for one is never seen by another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from mta.errors import UnsupportedModel
from mta.model.agreement import Reference, short_windows
from mta.model.base import BaseModel
from mta.personalize.adapters import TASK
from mta.serving.engine import Who


class SlotCache(Cache):  # type: ignore[misc]  # transformers brings no types
    """Keys and values of all slots, layer by layer; a pass sees the ``rows`` it was opened for.

    Shapes, for each layer: (slots, H, length, E), made when the first pass tells H and E. ``length`` has room to spare
    for what fills up the shorter rows of a pass.
    """

    def __init__(self, slots: int, length: int) -> None:
        super().__init__(layers=[])
        self.slots, self.length = slots, length
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.rows = slice(0, 0)
        self.positions = torch.empty(0)
        self.seen = 0

    def open(self, rows: slice, positions: Tensor, seen: int) -> SlotCache:
        """For a pass over ``rows`` at ``positions`` (B, T), of which the first ``seen`` positions are read."""
        self.rows, self.positions, self.seen = rows, positions, seen
        return self

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Take in (B, H, T, E) of a layer and give back all that the rows may see of it, (B, H, seen, E)."""
        if layer_idx == len(self.keys):
            made = [x.new_zeros(self.slots, x.shape[1], self.length, x.shape[3]) for x in (key_states, value_states)]
            self.keys.append(made[0])  # both or none: memory may end in between
            self.values.append(made[1])
        found = []
        for kept, new in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
            mine = kept[self.rows]
            row = torch.arange(len(mine), device=mine.device)[:, None]
            mine[row, :, self.positions] = new.transpose(1, 2)
            found.append(mine[:, :, : self.seen])
        return found[0], found[1]

    def exchange(self, one: int, other: int, tokens: int) -> None:
        """Let two slots change places; only their first ``tokens`` positions are moved."""
        pair, crossed = [one, other], [other, one]
        for kept in (*self.keys, *self.values):
            kept[pair, :, :tokens] = kept[crossed, :, :tokens]

    def clear(self, slot: int) -> None:
        """Zeros in the place of all that a slot holds."""
        for kept in (*self.keys, *self.values):
            kept[slot].zero_()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """What transformers takes for the past where it is not told positions: it always is."""
        return 0

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        return sum(kept.nbytes for kept in (*self.keys, *self.values))


Owner = tuple[Who, str]  # person, version and mode; and who asked


@dataclass(slots=True)
class Slot:
    """Whose a slot is, and the tokens whose keys and values lie in it."""

    owner: Owner | None = None
    tokens: list[int] = field(default_factory=list)
    turn: int = 0  # when it was last used


class Slots:
    """Which slots are at work, and which of the others may serve again."""

    def __init__(
        self, base: BaseModel, count: int, length: int, widest: int, exchanged: Callable[[int, int], None]
    ) -> None:
        self.cache = SlotCache(count, length + widest)  # no pass takes more than ``widest`` tokens of a row
        self.used = 0
        self._base, self._length = base, length
        self._slots = [Slot() for _ in range(count)]
        self._exchanged = exchanged  # told when two slots change places
        self._turn = 0

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def full(self) -> bool:
        """Whether all slots are at work."""
        return self.used == len(self)

    def owners(self) -> list[Owner]:
        """The owners of slots that are at work or warm."""
        return [slot.owner for slot in self._slots if slot.owner]

    def take(self, owner: Owner, prompt: Sequence[int]) -> tuple[int, int]:
        """A slot for a row of ``owner``, and how many of the prompt's tokens are in it already (never all of them)."""
        idle = range(self.used, len(self))
        chosen = max(idle, key=lambda n: (self._shared(n, owner, prompt), -self._slots[n].turn))
        shared = self._shared(chosen, owner, prompt)
        self.exchange(chosen, self.used)
        place, self.used = self.used, self.used + 1
        slot = self._slots[place]
        if slot.owner not in (None, owner):
            self.cache.clear(place)  # masked or not, nothing of one stays where another's passes go
        slot.owner, slot.tokens = owner, slot.tokens[:shared]
        return place, shared

    def leave(self, place: int) -> None:
        """A row is done; its slot stays warm."""
        self._turn += 1
        self._slots[place].turn = self._turn
        self.used -= 1
        self.exchange(place, self.used)

    def forget(self, wanted: Callable[[Owner], bool]) -> list[int]:
        """Warm slots of these owners are empty from now on, and hold zeros. Returns their places."""
        owners = {n: self._slots[n].owner for n in range(self.used, len(self))}
        found = [n for n, owner in owners.items() if owner is not None and wanted(owner)]
        for n in found:
            self.empty(n)
        return found

    def empty(self, place: int) -> None:
        """Take a slot that is not at work from its owner, and fill it with zeros."""
        self._slots[place] = Slot()
        self.cache.clear(place)

    def logits(self, rows: slice, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Go on with some rows, each by its own new ``tokens``; next-token logits after the last of each, (B, V)."""
        width = max(len(row) for row in tokens)
        starts = [len(slot.tokens) for slot in self._slots[rows]]
        filled = [list(row) + [self._base.pad_token] * (width - len(row)) for row in tokens]
        device = self._base.device
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)
        where = torch.tensor([n * width + len(row) - 1 for n, row in enumerate(tokens)], device=device)
        seen = max(starts) + width
        cache = self.cache.open(rows, positions, seen)
        known = positions.clamp(max=self._length - 1)  # what fills up a row may lie beyond the model's last place
        found = self._base.next_logits(torch.tensor(filled, device=device), known, cache, seen, where)
        for slot, row in zip(self._slots[rows], tokens):
            slot.tokens.extend(row)
        return found

    def _shared(self, place: int, owner: Owner, prompt: Sequence[int]) -> int:
        """How long a prefix of the prompt the slot holds for this owner."""
        slot, count = self._slots[place], 0
        if slot.owner != owner:
            return 0
        for known, wanted in zip(slot.tokens, prompt[:-1]):
            if known != wanted:
                break
            count += 1
        return count

    def exchange(self, one: int, other: int) -> None:
        """Let two slots change places."""
        if one == other:
            return
        tokens = max(len(self._slots[one].tokens), len(self._slots[other].tokens))
        self.cache.exchange(one, other, tokens)
        self._slots[one], self._slots[other] = self._slots[other], self._slots[one]
        self._exchanged(one, other)


def refuse_unservable(base: BaseModel) -> None:
    """Raises UnsupportedModel for a base whose rows do not go on from keys and values alone."""
    with short_windows(base.model):
        reference = Reference.of(base.model, base.tokenizer, base.prompts.max_tokens)
        tokens = len(reference.tokens)
        slots = Slots(base, 2, tokens, tokens, lambda *_: None)
        for asker in ("one", "other"):
            slots.take((TASK, asker), ())
        if base.packable and reference.continues(lambda new: slots.logits(slice(0, 2), new)):
            return
    raise UnsupportedModel(
        f"{base.name!r} cannot be served by the embedded engine: its rows do not go on from cached keys and values, as "
        "with recurrent states and convolutions",
        hint="Serve it by vLLM (docs/how-to/vllm.md), or give a base of attention layers alone, such as Llama.",
    )
