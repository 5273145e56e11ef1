"""Which processor this is, and what it can multiply."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.speed.data import Absent
from mta.system import device

_TOLD = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "bf16", "sve")
_BF16 = ("avx512_bf16", "amx_bf16", "bf16")


@dataclass(frozen=True, slots=True)
class Processor:
    """Its name as it gives it, the cores this process may use, and the instruction sets that matter here."""

    name: str
    cores: int
    flags: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        plain = re.sub(r"\((?:r|tm)\)|\bcpu\b|@.*", " ", self.name.lower())
        return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"

    @property
    def has_bf16(self) -> bool:
        """Whether it has instructions for bfloat16 products: without them there is nothing to gain."""
        return any(flag in self.flags for flag in _BF16)


@cache
def processor() -> Processor:
    """The one this runs on."""
    flags: set[str] = set()
    listing = Path("/proc/cpuinfo")
    for line in listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else ():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in ("flags", "Features"):
            flags |= set(value.split())
    return Processor(device.processor(), device.cores(), tuple(flag for flag in _TOLD if flag in flags))


def need(dtype: str) -> None:
    """Raises Absent for bfloat16 where the processor has no instructions for it."""
    if dtype == "bfloat16" and not processor().has_bf16:
        raise Absent("this processor multiplies no bfloat16")


def best_dtype() -> str:
    """bfloat16 where the processor has it, else float32."""
    return "bfloat16" if processor().has_bf16 else "float32"
