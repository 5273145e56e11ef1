"""The two files kept of a person: a state (safetensors), and by opt-in the history (JSON).

Identical for identical content, refused when a single bit differs.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

from safetensors import SafetensorError
from safetensors.torch import load, save

from mta.config import MergeMode
from mta.data.history import Item, Person
from mta.errors import Diverged, InputError, StateCorrupt
from mta.lora.batch import LoraBatch

SCHEMA = 1
_FIELDS = ("bank", "anchors", "w", "policy", "history", "work", "seed", "mode", "rank")
_NO_DIGEST = "0" * 64
_HEAD = b'{"__metadata__":{"state":"{\\"sha256\\": \\"'  # how every file of ours goes on after its 8 bytes of length
_DIGEST = slice(8 + len(_HEAD), 8 + len(_HEAD) + 64)
SEALED = 8 + len(_HEAD) + 64  # bytes at a file's beginning that hold its seal
_ASTRAY = "Training went astray: lower stack.training.lr, or merge.learned.lr, and personalize again."
_AGAIN = "Load an earlier version, or make it again:  mta personalize"


@dataclass(frozen=True, slots=True)
class Losses:
    """What a person's own shots cost: mean NLL per target token in nats, over ``tokens`` targets (our choice).

    Under the pooled model (base and task LoRA), with the merge, and with merge and stack (None without a stack). Merge
    and stack come from these very shots: the numbers say what was learnt of them, not how the next query will go.
    Raises Diverged for a number that is not finite, which JSON could not say either.
    """

    pooled: float
    merged: float
    stacked: float | None
    tokens: int

    def after(self, before: Losses | None) -> Losses:
        """Of these items and those learnt from ``before``, each as it was when it was learnt from."""
        if before is None:
            return self
        tokens = self.tokens + before.tokens

        def mean(new: float, old: float) -> float:
            return (new * self.tokens + old * before.tokens) / tokens

        stacked = self.stacked
        if stacked is not None and before.stacked is not None:
            stacked = mean(stacked, before.stacked)
        return Losses(mean(self.pooled, before.pooled), mean(self.merged, before.merged), stacked, tokens)

    def __post_init__(self) -> None:
        told = [self.pooled, self.merged] + ([] if self.stacked is None else [self.stacked])
        if not all(map(math.isfinite, told)) or self.tokens < 1:
            raise Diverged(f"losses on shots are finite numbers over at least one token, got {self}", hint=_ASTRAY)


@dataclass(frozen=True, eq=False)
class State:
    """What is kept of one person: anchors and coefficients of the merge, and the stack (None = merge only).

    ``bank`` is the bank's hash, ``history`` the digest of the shots, ``work`` the key of the work that made it
    (``work_key``); ``mode`` and ``rank`` say how the merge is computed; ``losses`` what was learnt of the shots, and
    ``settings`` is the digest of all settings that decided it: None and "" in states of before they were noted. Nothing
    in it depends on the clock, so the same work gives the same bytes.
    """

    bank: str
    anchors: tuple[int, ...]
    w: tuple[float, ...]
    policy: str
    history: str
    work: str
    seed: int
    stack: LoraBatch | None = None
    mode: MergeMode = "exact"
    rank: int | None = None
    losses: Losses | None = None
    settings: str = ""

    def __post_init__(self) -> None:
        if len(self.anchors) != len(self.w):
            raise InputError(
                f"a state needs one coefficient per anchor, got anchors {self.anchors}, w {self.w}",
                hint="Give as many coefficients as anchors.",
            )
        if not all(map(math.isfinite, self.w)):
            raise Diverged(f"coefficients are finite numbers, got w {self.w}", hint=_ASTRAY)
        if self.stack is not None and len(self.stack) != 1:
            raise InputError(
                f"a state's stack is exactly one adapter, got a batch of {len(self.stack)}",
                hint="Choose one:  stack.select([0])",
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, State) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.work)

    @property
    def nbytes(self) -> int:
        """Size of its file."""
        return len(self.to_bytes())

    def to_bytes(self) -> bytes:
        """One safetensors file: the stack's tensors, and all else as JSON under the one metadata key ``state``.

        One key, because safetensors writes several in random order. Its ``sha256`` covers every other byte of the file.
        """
        fields = {"sha256": _NO_DIGEST, "schema": SCHEMA} | {name: getattr(self, name) for name in _FIELDS}
        fields["scale"] = None if self.stack is None else self.stack.scale
        if self.losses is not None:  # a state without them keeps the bytes it always had
            fields["losses"] = asdict(self.losses)
        if self.settings:
            fields["settings"] = self.settings
        data = save({} if self.stack is None else self.stack.tensors(), {"state": json.dumps(fields)})
        return data[: _DIGEST.start] + _digest(data).encode() + data[_DIGEST.stop :]

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "the file") -> State:
        """The inverse of ``to_bytes``; ``source`` names the data in errors.

        Raises StateCorrupt for whatever is not, bit for bit, what ``to_bytes`` wrote.
        """
        if data[8 : _DIGEST.start] != _HEAD:
            got = f"got {len(data)} bytes that begin with {data[:16]!r}, expected a safetensors file with a state in it"
            raise StateCorrupt(f"{source} is not a person's state: {got}", hint=_AGAIN)
        found = _digest(data)
        if data[_DIGEST] != found.encode():
            raise StateCorrupt(
                f"{source} was changed or cut short: its sha256 is {found[:12]}…, expected {data[_DIGEST][:12]!r}…",
                hint=_AGAIN,
            )
        try:
            return cls._parsed(data)
        except (SafetensorError, ValueError, KeyError, TypeError, ArithmeticError, RuntimeError, Diverged) as error:
            raise StateCorrupt(
                f"{source} is whole, but not a state this version reads: got {error!r}, expected schema {SCHEMA}",
                hint="Update mta if a newer version wrote it. " + _AGAIN,
            ) from error

    @classmethod
    def _parsed(cls, data: bytes) -> State:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        fields = json.loads(header["__metadata__"]["state"])
        if fields["schema"] != SCHEMA:
            raise ValueError(f"schema {fields['schema']!r}")
        stack = None if fields["scale"] is None else LoraBatch.of_tensors(load(data), fields["scale"])
        losses = Losses(**fields["losses"]) if "losses" in fields else None
        kept = {name: fields[name] for name in _FIELDS}
        kept |= {"anchors": tuple(kept["anchors"]), "w": tuple(kept["w"])}
        return cls(**kept, stack=stack, losses=losses, settings=fields.get("settings", ""))


def seal_of(beginning: bytes) -> str | None:
    """The sha256 that a state's file bears, from its first ``SEALED`` bytes: two files of one seal are the same."""
    return beginning[_DIGEST].decode() if beginning[8 : _DIGEST.start] == _HEAD and len(beginning) >= SEALED else None


def work_key(bank: str, history_digest: str, config_yaml: str, seed: int) -> str:
    """Sha256 that names a piece of work: everything a state depends on."""
    return hashlib.sha256(json.dumps([bank, history_digest, config_yaml, seed]).encode()).hexdigest()


def _digest(data: bytes) -> str:
    digest = hashlib.sha256(data[: _DIGEST.start])
    digest.update(memoryview(data)[_DIGEST.stop :])
    return digest.hexdigest()


def history_to_bytes(person: Person) -> bytes:
    """A person's items and queries as JSON, sealed with a sha256; the id is not in it."""
    names = ("fields", "time", "id", "is_query")
    rows = [[dict(zip(names, item.__reduce__()[1])) for item in part] for part in (person.items, person.queries)]
    return json.dumps({"schema": SCHEMA, "sha256": _sealed(rows), "history": rows}).encode()


def history_from_bytes(id: str, data: bytes, source: str = "the file") -> Person:
    """The inverse of ``history_to_bytes``. Raises StateCorrupt."""
    try:
        value = json.loads(data)
        if value["schema"] != SCHEMA or value["sha256"] != _sealed(value["history"]):
            raise ValueError("another schema or sha256")
        items, queries = ([Item(**row) for row in part] for part in value["history"])
        return Person(id, tuple(items), tuple(queries))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StateCorrupt(
            f"{source} was changed or cut short: got {error!r}, expected schema {SCHEMA} and rows that fit the sha256",
            hint="Give the person's history again, or forget them:  mta forget",
        ) from error


def _sealed(rows: object) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
