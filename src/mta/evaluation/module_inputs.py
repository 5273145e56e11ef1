"""Mean inputs of the adapted modules: what a person's examples send into each layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mta.data.tasks.prompt import Example
from mta.lora.layers import Adapters, applied
from mta.model.base import BaseModel


@torch.inference_mode()
def mean_inputs(
    base: BaseModel, jobs: Sequence[Sequence[Example]], adapters: Sequence[Adapters], rows_per_batch: int = 16
) -> dict[str, Tensor]:
    """Return the mean input of each adapted module over all tokens of a job's examples: name -> (U, D)."""
    rows = sorted(((u, torch.tensor(e.tokens)) for u, job in enumerate(jobs) for e in job), key=lambda row: len(row[1]))
    sums = {name: torch.zeros(len(jobs), d, dtype=torch.float64) for name, (d, _) in base.targets.items()}
    counts = torch.zeros(len(jobs), 1, dtype=torch.float64)

    def add(name: str, owner: Tensor, mask: Tensor, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].view(*mask.shape, -1)
        sums[name].index_add_(0, owner, (x * mask[..., None].to(x)).double().sum(1).cpu())

    for start in range(0, len(rows), rows_per_batch):
        people, texts = zip(*rows[start : start + rows_per_batch])
        owner = torch.tensor(people)
        tokens = pad_sequence(list(texts), batch_first=True, padding_value=base.pad_token).to(base.device)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True).to(base.device)
        counts.index_add_(0, owner, mask.sum(1, keepdim=True).cpu().double())
        with applied(base.model, adapters, owner.to(base.device)), ExitStack() as hooks:
            for name in sums:
                module = base.model.get_submodule(name)
                hooks.enter_context(module.register_forward_pre_hook(partial(add, name, owner, mask)))
            base.model(input_ids=tokens, attention_mask=mask, use_cache=False)
    return {name: total / counts for name, total in sums.items()}
