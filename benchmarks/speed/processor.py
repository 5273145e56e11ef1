"""Which processor this is, and what it can multiply."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.speed.data import Absent
from mta.system import device, process

_CPU = torch.device("cpu")
_TOLD = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "bf16", "sve")


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


@cache
def processor() -> Processor:
    """The one this runs on."""
    flags = device.cpuinfo("flags", "Features").split()
    return Processor(device.cpu(), process.cores(), tuple(flag for flag in _TOLD if flag in flags))


def need(dtype: str) -> None:
    """Raises Absent for bfloat16 where the processor has no instructions for it."""
    if dtype == "bfloat16" and not device.multiplies_bfloat16(_CPU):
        raise Absent("this processor multiplies no bfloat16")
