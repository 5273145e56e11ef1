"""The formats of a person's two files: a state (safetensors) and, by opt-in, the history (JSON).

Equal content gives equal bytes. A state with one changed bit is refused, and so is a history with changed content.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load, save

from mta.data.history import Item, Person
from mta.errors import Diverged, InputError, StateCorrupt
from mta.lora.batch import LoraBatch
from mta.system.atomic import json_sha256

T = TypeVar("T")
STATE_SCHEMA = 3
HISTORY_SCHEMA = 1
_FIELDS = (
    *("bank", "anchors", "w", "policy", "history", "work", "seed"),
    *("settings", "gradient", "loglik", "shots", "untrained"),
)
_NO_DIGEST = "0" * 64
_HEAD = b'{"__metadata__":{"state":"{\\"sha256\\": \\"'  # the bytes after the 8 bytes of length, in every state file
_DIGEST = slice(8 + len(_HEAD), 8 + len(_HEAD) + 64)
HEADER_BYTES = 8 + len(_HEAD) + 64  # number of first bytes of a file that contain its sha256
_ASTRAY = "Lower stack.training.lr or the rate of a merge that is trained, and personalize again."
_AGAIN = "Load an earlier version, or make the state again:  mta personalize"


@dataclass(frozen=True, slots=True)
class Losses:
    """Losses on a person's own shots: mean NLL per target token in nats, over ``tokens`` targets (our choice).

    Under the pooled model (base and task LoRA), with the merge, and with merge and stack (None without a stack). The
    merge's loss is None where nothing reads it: it would take longer than the merge. Merge and stack were fitted to
    these shots, so the losses do not estimate those of new queries.
    Raises Diverged for a number that is not finite.
    """

    pooled: float
    merged: float | None
    stacked: float | None
    tokens: int

    def after(self, before: Losses | None) -> Losses:
        """Return the mean losses over these items and those of ``before``, each measured when it was learned."""
        if before is None:
            return self
        tokens = self.tokens + before.tokens

        def mean(new: float | None, old: float | None) -> float | None:
            return new if new is None or old is None else (new * self.tokens + old * before.tokens) / tokens

        pooled = (self.pooled * self.tokens + before.pooled * before.tokens) / tokens
        return Losses(pooled, mean(self.merged, before.merged), mean(self.stacked, before.stacked), tokens)

    def __post_init__(self) -> None:
        losses = [one for one in (self.pooled, self.merged, self.stacked) if one is not None]
        if not all(map(math.isfinite, losses)) or self.tokens < 1:
            expected = "expected finite numbers over at least one token"
            raise Diverged(f"training diverged: losses on shots are invalid: got {self}, {expected}", hint=_ASTRAY)


@dataclass(frozen=True, eq=False)
class State:
    """What is stored per person: the merge's anchors and coefficients, the stack, and where they came from.

    Nothing depends on the clock, so the same work gives the same bytes.
    """

    bank: str  # hash of the bank
    anchors: tuple[int, ...]
    w: tuple[float, ...]  # coefficient of each anchor
    policy: str
    history: str  # digest of the shots
    work: str  # hash of all inputs (``state_key``)
    seed: int
    stack: LoraBatch | None = None  # None: merge only
    losses: Losses | None = None  # on the shots
    settings: str = ""  # hash of the settings that affect a state
    # What ``w`` was solved from: sums over the shots at the bank's mu, needed to add new items. Unset if the policy
    # reads no gradients, or everybody gets the same merge.
    gradient: tuple[float, ...] = ()
    loglik: float = 0.0
    shots: int = 0  # number of items behind the state
    untrained: int = 0  # of ``shots``: those that an update kept the stack for, instead of training it on them

    def __post_init__(self) -> None:
        if len(self.anchors) != len(self.w):
            raise InputError(
                f"a state needs one coefficient per anchor, got anchors {self.anchors}, w {self.w}",
                hint="Give as many coefficients as anchors.",
            )
        if not all(map(math.isfinite, [*self.w, *self.gradient, self.loglik])):
            got = f"got w {self.w} from shots with the log-likelihood {self.loglik}"
            raise Diverged(f"training diverged: coefficients are invalid: {got}, expected finite numbers", hint=_ASTRAY)
        if self.stack is not None and len(self.stack) != 1:
            raise InputError(
                f"a state's stack must be exactly one adapter, got a batch of {len(self.stack)}",
                hint="Choose one:  stack.select([0])",
            )
        if self.stack and not all(part.isfinite().all() for pair in self.stack.factors.values() for part in pair):
            raise Diverged("training diverged: the stack contains NaN or infinity", hint=_ASTRAY)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, State) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.work)

    def to_bytes(self) -> bytes:
        """Return one safetensors file: the stack's tensors, and all else as JSON under the metadata key ``state``.

        One key, because safetensors writes several keys in random order. ``sha256`` covers all other bytes of the file.
        """
        fields = {"sha256": _NO_DIGEST, "schema": STATE_SCHEMA} | {name: getattr(self, name) for name in _FIELDS}
        fields["scale"] = None if self.stack is None else self.stack.scale
        fields["losses"] = None if self.losses is None else asdict(self.losses)
        data = save({} if self.stack is None else self.stack.tensors(), {"state": json.dumps(fields)})
        return data[: _DIGEST.start] + _digest(data).encode() + data[_DIGEST.stop :]

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "the file") -> State:
        """Invert ``to_bytes``; ``source`` names the data in errors.

        Raises StateCorrupt for data that ``to_bytes`` did not write, bit for bit.
        """
        if data[8 : _DIGEST.start] != _HEAD:
            got = f"got {len(data)} bytes that begin with {data[:16]!r}, expected a safetensors file with a state"
            raise StateCorrupt(f"{source} is not a person's state: {got}", hint=_AGAIN)
        digest = _digest(data)
        if data[_DIGEST] != digest.encode():
            raise StateCorrupt(
                f"{source} was changed or cut short: its sha256 is {digest[:12]}…, expected {data[_DIGEST][:12]!r}…",
                hint=_AGAIN,
            )
        try:
            return cls._parsed(data)
        except (SafetensorError, ValueError, KeyError, TypeError, ArithmeticError, RuntimeError, Diverged) as error:
            raise StateCorrupt(
                f"{source} is intact, but not a state this version reads: "
                f"got {error!r}, expected schema {STATE_SCHEMA}",
                hint="Update mta if a newer version wrote the file. " + _AGAIN,
            ) from error

    @classmethod
    def _parsed(cls, data: bytes) -> State:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        fields = json.loads(header["__metadata__"]["state"])
        if fields["schema"] != STATE_SCHEMA:
            raise ValueError(f"schema {fields['schema']!r}")
        stack = None if fields["scale"] is None else LoraBatch.of_tensors(load(data), fields["scale"])
        losses = None if fields["losses"] is None else Losses(**fields["losses"])
        kept = {name: fields[name] for name in _FIELDS}
        kept |= {name: tuple(kept[name]) for name in ("anchors", "w", "gradient")}
        return cls(**kept, stack=stack, losses=losses)


def seal_of(beginning: bytes) -> str:
    """Return the sha256 in a state's file, read from its first ``HEADER_BYTES``; "" for another file."""
    is_state = beginning[8 : _DIGEST.start] == _HEAD and len(beginning) >= HEADER_BYTES
    return beginning[_DIGEST].decode("ascii", "replace") if is_state else ""


def state_key(bank: str, history_digest: str, config_yaml: str, seed: int) -> str:
    """Return the sha256 over everything that a state depends on."""
    return json_sha256([bank, history_digest, config_yaml, seed])


def _digest(data: bytes) -> str:
    digest = hashlib.sha256(data[: _DIGEST.start])
    digest.update(memoryview(data)[_DIGEST.stop :])
    return digest.hexdigest()


def history_to_bytes(person: Person) -> bytes:
    """Return a person's items and queries as JSON with a sha256, without the id."""

    def row(item: Item) -> dict[str, object]:
        return {"fields": dict(item.fields), "time": item.time, "id": item.id, "is_query": item.is_query}

    rows = [[row(item) for item in part] for part in (person.items, person.queries)]
    return sealed_json("history", rows, HISTORY_SCHEMA)


def history_from_bytes(id: str, data: bytes, source: str = "the file") -> Person:
    """Invert ``history_to_bytes``. Raises StateCorrupt."""

    def parse(rows: Any) -> Person:
        items, queries = (tuple(Item(**row) for row in part) for part in rows)
        return Person(id, items, queries)

    hint = "Give the person's history again, or forget them:  mta forget"
    return opened_json("history", data, HISTORY_SCHEMA, source, hint, parse)


def sealed_json(name: str, value: object, schema: int) -> bytes:
    """Return a JSON file with one value, its schema, and a sha256 that detects damage."""
    return json.dumps({"schema": schema, "sha256": json_sha256(value), name: value}).encode()


def opened_json(name: str, data: bytes, schema: int, source: str, hint: str, parse: Callable[[Any], T]) -> T:
    """Invert ``sealed_json``, and ``parse`` the value. Raises StateCorrupt with ``source`` and ``hint``."""
    try:
        file = json.loads(data)
        if file["schema"] != schema or file["sha256"] != json_sha256(file[name]):
            raise ValueError("another schema or sha256")
        return parse(file[name])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StateCorrupt(
            f"{source} was changed or cut short: got {error!r}, expected schema {schema} and {name} with that sha256",
            hint=hint,
        ) from error
