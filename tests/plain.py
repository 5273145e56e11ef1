"""The slow and obvious way: updates added into a copy of the weights, one example per forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from mta.data.tasks.prompt import Example
from mta.lora.batch import LoraBatch
from mta.model.base import BaseModel


def weights(base: BaseModel, *updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapted layers' weights with dense updates (O, D) added."""
    return {
        f"{name}.weight": base.model.get_submodule(name).weight + sum(update[name] for update in updates)
        for name in base.targets
    }


def update(batch: LoraBatch, number: int = 0) -> dict[str, Tensor]:
    """One adapter's dense update of every layer."""
    return {name: batch.delta(name)[number] for name in batch.names}


def merge(batch: LoraBatch, ids: Sequence[int], w: Tensor) -> dict[str, Tensor]:
    """The weighted sum of dense updates."""
    return {name: sum(w[k] * batch.delta(name)[n] for k, n in enumerate(ids)) for name in batch.names}


def logits(base: BaseModel, changed: Mapping[str, Tensor], tokens: Sequence[int]) -> Tensor:
    """(T, V) logits of the model with ``changed`` weights."""
    return functional_call(base.model, dict(changed), (), {"input_ids": torch.tensor([tokens])}).logits[0]


def log_likelihood(base: BaseModel, changed: Mapping[str, Tensor], example: Example) -> Tensor:
    """Sum of log p over the target tokens of one example."""
    table = logits(base, changed, example.tokens).log_softmax(-1)
    places = torch.arange(example.target_start, len(example.tokens))
    return table[places - 1, torch.tensor(example.target)].sum()
