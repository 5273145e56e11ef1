"""KV cache of the rows being decoded: one slot per row, kept warm after an answer for follow-up requests.

    slots   0 ......... used ................ count
            in use       warm or empty; the least recently used is replaced first

Slots in use are contiguous, so a pass reads a slice of memory and gathers nothing. When a row leaves, the last slot in
use is swapped into its place. Only the same *owner* (person, version, mode, and caller) can reuse a warm slot: nothing
computed for one owner is visible to another. A prompt reuses a slot only if it keeps at least half of its tokens, so
that two conversations of one owner both stay warm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from mta.errors import UnsupportedModel
from mta.model.agreement import Reference, short_windows
from mta.model.base import BaseModel
from mta.serving.embedded.adapter_slots import AdapterSlots
from mta.serving.engine import ServedModel
from mta.system.device import moved


class SlotCache(Cache):  # type: ignore[misc]  # transformers brings no types
    """Keys and values of all slots, by layer.

    Shape per layer: (slots, H, length, E), allocated in the first pass, which determines H and E. ``length`` includes
    room for the padding of shorter rows in a pass. A pass writes ``rows`` at ``positions`` (B, T), and reads their
    first ``seen`` positions.
    """

    def __init__(self, slots: int, length: int) -> None:
        super().__init__(layers=[])
        self.slots, self.length = slots, length
        self.kept: list[list[Tensor]] = []  # keys and values of each layer
        self.rows = slice(0, 0)
        self.positions = torch.empty(0)
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Store a layer's (B, H, T, E) and return all that the rows may attend to, (B, H, seen, E)."""
        states = key_states, value_states
        if layer_idx == len(self.kept):
            self.kept.append([x.new_zeros(self.slots, x.shape[1], self.length, x.shape[3]) for x in states])
        seen = []
        for kept, new in zip(self.kept[layer_idx], states):
            own = kept[self.rows]
            row = torch.arange(len(own), device=own.device)[:, None]
            own[row, :, self.positions] = new.transpose(1, 2)
            seen.append(own[:, :, : self.seen])
        return seen[0], seen[1]

    def exchange(self, one: int, other: int, tokens: int) -> None:
        """Swap two slots; only their first ``tokens`` positions are moved."""
        if not self.kept:
            return
        (pair,) = moved(self.kept[0][0].device, torch.tensor([one, other]))
        crossed = pair.flip(0)
        for kept in chain(*self.kept):
            kept[pair, :, :tokens] = kept[crossed, :, :tokens]

    def clear(self, slot: int) -> None:
        if self.kept:
            torch._foreach_zero_([kept[slot] for kept in chain(*self.kept)])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0. Transformers uses this length only without explicit positions, and we always pass positions."""
        return 0


Owner = tuple[ServedModel, str]  # (person, version, and mode; caller)


@dataclass(slots=True)
class Slot:
    """Owner of a slot, and the tokens whose keys and values the slot holds.

    Behind them may be others, up to position ``written``: padding, and what was rewound. No row attends to them.
    """

    owner: Owner | None = None
    tokens: list[int] = field(default_factory=list)
    written: int = 0
    last_used: float = 0.0


class Slots:
    """Assigns KV slots to rows and reuses warm slots. Adapter slots are swapped and emptied together with KV slots."""

    def __init__(
        self, base: BaseModel, count: int, length: int, widest: int, adapters: AdapterSlots | None = None
    ) -> None:
        self.cache = SlotCache(count, length + widest)  # a pass processes at most ``widest`` tokens of a row
        self.used = 0
        self._base, self._length, self._adapters = base, length, adapters
        self._slots = [Slot() for _ in range(count)]

    def __len__(self) -> int:
        return len(self._slots)

    def known(self) -> list[ServedModel]:
        """Return the people, versions, and modes of slots in use and warm slots."""
        return [slot.owner[0] for slot in self._slots if slot.owner]

    def take(self, owner: Owner, prompt: Sequence[int]) -> tuple[int, int]:
        """Take a slot for a row of ``owner``; return its index and the number of reused prompt tokens (never all)."""
        place, slots = self.used, self._slots
        reusable = {n: self._reusable(slots[n], owner, prompt) for n in range(place, len(self))}
        chosen = max(reusable, key=lambda n: (reusable[n], -slots[n].last_used))
        self.exchange(chosen, place)
        self.used += 1
        slot = slots[place]
        if slot.owner not in (None, owner):
            self.cache.clear(place)  # even masked data of one owner must not stay in another owner's slot
            slot.written = 0
        slot.owner, slot.tokens = owner, slot.tokens[: reusable[chosen]]
        return place, reusable[chosen]

    def rewind(self, place: int, tokens: int) -> None:
        """Keep only the first ``tokens`` tokens of a row."""
        del self._slots[place].tokens[tokens:]

    def leave(self, place: int) -> None:
        """Release a row's slot, which stays warm."""
        self._slots[place].last_used = time.monotonic()
        self.used -= 1
        self.exchange(place, self.used)

    def forget(self, matches: Callable[[Owner], bool]) -> None:
        """Empty the warm slots whose owner matches."""
        for place, slot in enumerate(self._slots[self.used :], self.used):
            if slot.owner and matches(slot.owner):
                self.empty(place)

    def empty_from(self, used: int) -> None:
        """Release and empty all slots except the first ``used``."""
        self.used = used
        for place in range(used, len(self)):
            self.empty(place)

    def empty(self, place: int) -> None:
        """Remove the owner of an unused slot, and fill the slot with zeros."""
        self._slots[place] = Slot()
        self.cache.clear(place)
        if self._adapters:
            self._adapters.clear(place)

    def logits(
        self, rows: slice, tokens: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """Process new ``tokens`` of each row; return the next-token logits after each row's last token, (B, V).

        The logits of tokens that are ``wanted`` of a row are not rounded to a dtype below float32.
        """
        width = max(len(row) for row in tokens)
        starts = [len(slot.tokens) for slot in self._slots[rows]]
        padded = [list(row) + [self._base.pad_token] * (width - len(row)) for row in tokens]
        device = self._base.device
        ends = [n * width + len(row) - 1 for n, row in enumerate(tokens)]
        pairs = torch.tensor([(n, token) for n, some in enumerate(wanted or ()) for token in some], dtype=torch.long)
        here = torch.tensor(padded), torch.tensor(starts), torch.tensor(ends), pairs.view(-1, 2)
        fed, first, last, pairs = moved(device, *here)
        positions = first[:, None] + torch.arange(width, device=device)
        valid = positions.clamp(max=self._length - 1)  # padding may lie beyond the model's last position
        cache = self.cache
        cache.rows, cache.positions, cache.seen = rows, positions, max(starts) + width
        exact = (pairs[:, 0], pairs[:, 1]) if len(pairs) else None
        for slot in self._slots[rows]:  # before the pass: one that fails may have written them
            slot.written = max(slot.written, len(slot.tokens) + width)
        logits = self._base.next_logits(fed, valid, cache, cache.seen, last, exact)
        for slot, row in zip(self._slots[rows], tokens):
            slot.tokens.extend(row)
        return logits

    def _reusable(self, slot: Slot, owner: Owner, prompt: Sequence[int]) -> int:
        """Return the length of the prompt prefix that the slot holds for this owner; 0 if most of it would be lost."""
        if slot.owner != owner:
            return 0
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(slot.tokens, prompt[:-1])))
        return shared if 2 * shared >= len(slot.tokens) else 0

    def exchange(self, one: int, other: int) -> None:
        if one == other:
            return
        tokens = max(self._slots[one].written, self._slots[other].written)
        self.cache.exchange(one, other, tokens)
        self._slots[one], self._slots[other] = self._slots[other], self._slots[one]
        if self._adapters:
            self._adapters.exchange(one, other)


def refuse_unservable(base: BaseModel) -> None:
    """Raises UnsupportedModel if the base cannot continue from cached keys and values alone."""
    with short_windows(base.model):
        reference = Reference.of(base.model, base.tokenizer, base.prompts.max_tokens)
        tokens = len(reference.tokens)
        slots = Slots(base, 2, tokens, tokens)
        if base.packable and reference.continues(lambda new: slots.logits(slice(0, 2), new)):
            return
    raise UnsupportedModel(
        f"the embedded engine cannot serve {base.name!r}: the model cannot continue from cached keys and values alone, "
        "as with recurrent states and convolutions",
        hint="Serve it with vLLM (docs/how-to/vllm.md), or use a base with attention layers only, such as Llama.",
    )
