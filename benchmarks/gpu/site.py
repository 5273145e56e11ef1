"""A shape on a device, and what all its rows use."""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from benchmarks.gpu.shapes import Shape
from benchmarks.speed.settings import Settings
from benchmarks.speed.training import ANCHORS, random_bank
from mta.lora.batch import LoraBatch
from mta.model.base import BaseModel


@dataclass
class Site:
    """A shape on a device, with its budget in bytes and the sizes of a run."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    memory: int
    settings: Settings

    @cached_property
    def base(self) -> BaseModel:
        """Our model, loaded at the first use."""
        return self.shape.base(self.device, self.dtype)

    def plain(self) -> Any:
        """The same weights as transformers has them, for the peer."""
        return self.shape.model(self.device, self.dtype)

    @cached_property
    def bank(self) -> LoraBatch:
        """Random anchors of rank 8 on the device."""
        return random_bank(self.base, self.anchors)

    @property
    def anchors(self) -> int:
        """How many anchors ``bank`` has."""
        return 4 if self.settings.quick else ANCHORS

    def name(self, *parts: str) -> str:
        """The name of a row."""
        return ", ".join([self.shape.name, *parts])


def release(device: torch.device) -> None:
    """Give unused memory back to the device."""
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # after some errors, CUDA repeats the error at every later call
            torch.cuda.empty_cache()
