"""``LoraBatch``: adapters of one shape as stacked tensors.

The update of adapter u on one layer is ``scale * B[u] @ A[u]``.
Shapes: A (U, R, D), B (U, O, R) with U adapters, R rank, D inputs, O outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mta.errors import InputError
from mta.system.device import moved

Shapes = Mapping[str, tuple[int, int]]


class Factors(NamedTuple):
    """One layer's factors: ``a`` (U, R, D), ``b`` (U, O, R)."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LoraBatch:
    """U adapters of the same layers: layer name -> Factors, and the common scale."""

    factors: dict[str, Factors]
    scale: float = 1.0

    def __len__(self) -> int:
        return next(iter(self.factors.values())).a.shape[0]

    def __repr__(self) -> str:
        dtype = next(iter(self.factors.values())).a.dtype
        return f"LoraBatch({len(self)} of rank {self.rank}, {len(self.factors)} layers, {dtype} on {self.device})"

    @property
    def rank(self) -> int:
        return next(iter(self.factors.values())).a.shape[1]

    @property
    def device(self) -> torch.device:
        return next(iter(self.factors.values())).a.device

    @property
    def names(self) -> list[str]:
        """Adapted layers, in the order of the axis L of per-layer coefficients."""
        return list(self.factors)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer name -> (D, O)."""
        return {name: (f.a.shape[2], f.b.shape[1]) for name, f in self.factors.items()}

    def map(self, change: Callable[[Tensor], Tensor]) -> LoraBatch:
        """Return the batch with ``change`` applied to every A and B."""
        return replace(self, factors={name: Factors(change(f.a), change(f.b)) for name, f in self.factors.items()})

    def select(self, index: Tensor | Sequence[int] | slice) -> LoraBatch:
        if isinstance(index, Sequence):  # as a tensor on the device: a list would be copied there once per factor
            (index,) = moved(self.device, torch.tensor(list(index), dtype=torch.long))
        return self.map(lambda t: t[index])

    def to(self, *place: torch.device | torch.dtype) -> LoraBatch:
        return self.map(lambda t: t.to(*place))  # type: ignore[call-overload]

    def scaled_into_b(self) -> LoraBatch:
        """Return the same updates with scale 1."""
        if self.scale == 1.0:
            return self
        return LoraBatch({name: Factors(f.a, f.b * self.scale) for name, f in self.factors.items()})

    def padded(self, rank: int) -> LoraBatch:
        """Return the same updates at a higher rank, zero-padded."""
        pad, more = torch.nn.functional.pad, rank - self.rank
        factors = {n: Factors(pad(f.a, (0, 0, 0, more)), pad(f.b, (0, more))) for n, f in self.factors.items()}
        return replace(self, factors=factors)

    def in_order(self, layers: Iterable[str]) -> LoraBatch:
        """Return the same adapters with their layers in this order. The order of a sum affects its rounding."""
        return replace(self, factors={layer: self.factors[layer] for layer in layers})

    def delta(self, name: str) -> Tensor:
        """Return the dense updates of one layer, (U, O, D): only for checks of small models."""
        return self.scale * self.factors[name].b @ self.factors[name].a

    def tensors(self) -> dict[str, Tensor]:
        """Return contiguous CPU tensors ``<layer>.a`` and ``<layer>.b`` for a safetensors file."""
        return {key: part.detach().cpu().contiguous() for key, part in self.parts().items()}

    def parts(self) -> dict[str, Tensor]:
        """Return the factors on their device, without a copy, under the names of ``tensors``."""
        return {f"{name}.{end}": part for name, pair in self.factors.items() for end, part in zip("ab", pair)}

    @classmethod
    def of_tensors(cls, flat: Mapping[str, Tensor], scale: float) -> LoraBatch:
        """Invert ``tensors``. Raises InputError if an A has no B, or shapes do not fit."""
        names = [key.removesuffix(".a") for key in flat if key.endswith(".a")]
        if not names or set(flat) != {f"{n}.a" for n in names} | {f"{n}.b" for n in names}:
            raise InputError(
                f"expected tensors '<layer>.a' and '<layer>.b' in pairs, got {', '.join(flat) or 'none'}",
                hint="Give all tensors that LoraBatch.tensors() returned.",
            )
        batch = cls({name: Factors(flat[f"{name}.a"], flat[f"{name}.b"]) for name in names}, scale)
        for name, (a, b) in batch.factors.items():
            if a.ndim != 3 or b.ndim != 3 or a.shape[:2] != (len(batch), batch.rank) or b.shape[::2] != a.shape[:2]:
                raise InputError(
                    f"factors of {name!r} do not fit together: A {tuple(a.shape)}, B {tuple(b.shape)}",
                    hint="Give A (adapters, rank, inputs) and B (adapters, outputs, rank), one rank for all layers.",
                )
        return batch


def join(batches: Sequence[LoraBatch]) -> LoraBatch:
    """Return the sum of updates, adapter by adapter: factors concatenated on the rank axis, scales folded into B."""
    return _concatenated([batch.scaled_into_b() for batch in batches], 1, 2)


def shared_ranks(batches: Sequence[LoraBatch], name: str) -> tuple[Tensor, Tensor]:
    """Return the concatenated ranks of all adapters of a layer: A (P, D), and B (O, P) times its scale."""
    a = torch.cat([batch.factors[name].a.flatten(0, 1) for batch in batches])
    b = torch.cat([(batch.factors[name].b * batch.scale).transpose(0, 1).flatten(1) for batch in batches], 1)
    return a, b


def concatenate(batches: Iterable[LoraBatch]) -> LoraBatch:
    """Return all adapters of several batches as one batch, zero-padded to the largest rank."""
    parts = list(batches)
    rank = max(part.rank for part in parts)
    if len({part.scale for part in parts}) > 1:
        parts = [part.scaled_into_b() for part in parts]
    return _concatenated([part.padded(rank) for part in parts], 0, 0)


def even(factors: Mapping[str, Factors]) -> LoraBatch:
    """Return adapters from factors with different ranks per layer, zero-padded to the largest rank."""
    widest = max(pair.a.shape[1] for pair in factors.values())
    return LoraBatch({name: LoraBatch({name: pair}).padded(widest).factors[name] for name, pair in factors.items()})


def _concatenated(parts: Sequence[LoraBatch], a: int, b: int) -> LoraBatch:
    """Concatenate batches of equal scale on axis ``a`` of A and axis ``b`` of B."""
    if any(part.factors.keys() != parts[0].factors.keys() for part in parts):
        raise InputError("adapters of different layers cannot be joined", hint="Give each a factor for every layer.")
    pairs = {name: tuple(zip(*(part.factors[name] for part in parts))) for name in parts[0].factors}
    return LoraBatch({n: Factors(torch.cat(x, a), torch.cat(y, b)) for n, (x, y) in pairs.items()}, parts[0].scale)


def fresh(
    shapes: Shapes, rank: int, scale: float, seed: int, keys: Sequence[str], dtype: torch.dtype = torch.float32
) -> LoraBatch:
    """Return untrained adapters, one per key: A from a hash of (seed, key, layer), B zero.

    A is uniform in +-1/sqrt(D), as in PEFT. Equal keys start from the same A, so the anchors of a bank can be merged
    (stage 1). The initial values do not depend on the cohort or worker.
    """
    factors = {}
    for name, (d, o) in shapes.items():
        rows = {key: _hashed_uniform((rank, d), f"{seed}/{key}/{name}") for key in set(keys)}
        a = torch.stack([rows[key] for key in keys]).to(dtype)
        factors[name] = Factors(a, torch.zeros(len(keys), o, rank, dtype=dtype))
    return LoraBatch(factors, scale)


def _hashed_uniform(shape: tuple[int, int], key: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % 2**63
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) / shape[1] ** 0.5
