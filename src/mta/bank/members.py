"""The people whom a bank was trained on, as keyed hashes."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence, Set
from functools import cached_property
from itertools import chain
from typing import Literal, get_args

from pydantic import BaseModel, Field

from mta.data.history import Person

TrainedPart = Literal["task LoRA", "clusters", "anchor", "calibration"]


class MemberHashes(BaseModel, frozen=True, extra="forbid"):
    """Members as keyed hashes, and the key. Readers can test a guessed id, but cannot list the ids."""

    key: str
    task: tuple[str, ...]
    candidates: tuple[str, ...]
    anchors: tuple[tuple[str, ...], ...]  # the people of each anchor, in the order of anchors
    calibration: tuple[str, ...] = ()
    kept_back: tuple[str, ...] = ()  # of candidates with the items that they kept back

    def to_bytes(self) -> bytes:
        """Return the contents of ``members.json``; equal members give equal bytes."""
        return self.model_dump_json(indent=1).encode() + b"\n"


class Members(BaseModel, frozen=True, extra="forbid"):
    """The people whom a bank was trained on: their numbers and, if the folder has ``members.json``, their hashes.

    ``bank.json`` holds the sha256 of ``members.json``, which does not reveal members: their key is derived from all
    histories. So a bank that was published without ``members.json`` has the same hash.
    """

    task: int
    candidates: int
    anchors: int
    sha256: str
    hashed: MemberHashes | None = Field(default=None, exclude=True, repr=False)

    @classmethod
    def of(
        cls,
        secret: str,
        task: Sequence[str],
        candidates: Sequence[str],
        anchors: Sequence[Sequence[str]],
        calibration: Sequence[str] = (),
        kept_back: Sequence[Person] = (),
    ) -> Members:
        """Hash ids with a key of this bank, derived from ``secret``; equal builds give equal members."""
        key = hashlib.sha256(f"members/{secret}".encode()).hexdigest()[:32]
        groups = {"task": task, "candidates": candidates, "calibration": calibration}
        groups["kept_back"] = [_with_items(person) for person in kept_back]
        hashes = {name: _all_keyed(key, ids) for name, ids in groups.items()}
        each = tuple(_all_keyed(key, ids) for ids in anchors)
        return cls.known_by(MemberHashes(key=key, anchors=each, **hashes))

    def calibrated_on(self, people: Sequence[str]) -> Members:
        """Return the members, who must be known, with these people behind the calibration."""
        assert self.hashed is not None
        hashes = _all_keyed(self.hashed.key, people)
        return self.known_by(self.hashed.model_copy(update={"calibration": hashes}))

    @classmethod
    def known_by(cls, hashed: MemberHashes) -> Members:
        """Return the members with the counts and the sha256 that ``bank.json`` holds."""
        counts = {
            "task": len(hashed.task),
            "candidates": len(hashed.candidates),
            "anchors": sum(map(len, hashed.anchors)),
        }
        return cls(**counts, sha256=hashlib.sha256(hashed.to_bytes()).hexdigest(), hashed=hashed)

    @cached_property
    def hashes(self) -> dict[TrainedPart, frozenset[str]]:
        """The hashes of the people behind each part."""
        if (known := self.hashed) is None:
            return {}
        groups = known.task, known.candidates, chain(*known.anchors), known.calibration
        return dict(zip(get_args(TrainedPart), map(frozenset, groups), strict=True))

    @property
    def people(self) -> int:
        """The number of people behind all parts, each counted once; 0 if the members are unknown."""
        return len(frozenset().union(*self.hashes.values()))

    @cached_property
    def _kept_back(self) -> frozenset[str]:
        return frozenset(self.hashed.kept_back if self.hashed else ())

    def kept_back(self, person: Person) -> bool:
        """Return whether the items of this person are those that a candidate kept back from the task LoRA."""
        return self.hashed is not None and _keyed(self.hashed.key, _with_items(person)) in self._kept_back

    def parts_of(self, person: str) -> list[TrainedPart]:
        """Return the parts of the bank that were trained on this person; none if the members are unknown."""
        mine = self.hash_of(person)
        return [part for part, hashes in self.hashes.items() if mine in hashes]

    def hash_of(self, person: str) -> str:
        """Return the hash of a person; empty if the members are unknown."""
        return _keyed(self.hashed.key, person) if self.hashed else ""

    def without(self, gone: Set[str]) -> Members:
        """Return the members, who must be known, with these people (hashes) behind no anchor."""
        assert self.hashed is not None
        anchors = tuple(tuple(one for one in own if one not in gone) for own in self.hashed.anchors)
        return self.known_by(self.hashed.model_copy(update={"anchors": anchors}))

    def anchors_of(self, person: str) -> list[int]:
        """Return the numbers of the anchors that were trained on this person; none if the members are unknown."""
        mine, anchors = self.hash_of(person), self.hashed.anchors if self.hashed else ()
        return [number for number, hashes in enumerate(anchors) if mine in hashes]

    def trained(self, person: str, *parts: TrainedPart) -> bool:
        """Return whether one of these parts was trained on this person."""
        return not {*parts}.isdisjoint(self.parts_of(person))


def _with_items(person: Person) -> str:
    return f"{person.id}/{person.digest()}"


def _all_keyed(key: str, people: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(_keyed(key, person) for person in people))


def _keyed(key: str, person: str) -> str:
    return hmac.new(bytes.fromhex(key), person.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:24]
