"""Batches of LoRAs: stacked factors, their algebra, and the layer that adds them to a frozen model."""

from mta.lora.batch import Factors, LoraBatch
from mta.lora.layers import Adapters, Gated, PerPerson, Shared, applied
from mta.lora.merge import merge_exact, merge_factor, merge_svd

__all__ = [
    "Adapters",
    "Factors",
    "Gated",
    "LoraBatch",
    "PerPerson",
    "Shared",
    "applied",
    "merge_exact",
    "merge_factor",
    "merge_svd",
]
