"""Mean inputs of the adapted modules: what a person's examples send into each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mta.data.tasks.prompt import Example
from mta.lora.layers import Adapters, applied
from mta.model.base import BaseModel


@torch.inference_mode()
def mean_inputs(
    base: BaseModel, jobs: Sequence[Sequence[Example]], adapters: Sequence[Adapters], rows_per_batch: int = 16
) -> dict[str, Tensor]:
    """Return the mean input of each adapted module over all tokens of a job's examples: name -> (U, D)."""
    rows = sorted(((u, e.tokens) for u, job in enumerate(jobs) for e in job), key=lambda row: len(row[1]))
    sums = {name: torch.zeros(len(jobs), d, dtype=torch.float64) for name, (d, _) in base.targets.items()}
    counts = torch.zeros(len(jobs), 1, dtype=torch.float64)
    for start in range(0, len(rows), rows_per_batch):
        chosen = rows[start : start + rows_per_batch]
        width = max(len(tokens) for _, tokens in chosen)
        tokens = torch.tensor([[*t, *[base.pad_token] * (width - len(t))] for _, t in chosen], device=base.device)
        mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for _, t in chosen], device=base.device)
        owner = torch.tensor([u for u, _ in chosen])
        counts.index_add_(0, owner, mask.sum(1, keepdim=True).cpu().double())
        with applied(base.model, adapters, owner.to(base.device)), _recorded(base, sums, owner, mask):
            base.model(input_ids=tokens, attention_mask=mask, use_cache=False)
    return {name: total / counts for name, total in sums.items()}


@contextmanager
def _recorded(base: BaseModel, sums: dict[str, Tensor], owner: Tensor, mask: Tensor) -> Iterator[None]:
    """Within the block, add the inputs of each module to its sum."""

    def hook_of(name: str) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].view(*mask.shape, -1)
            sums[name].index_add_(0, owner, (x * mask[..., None].to(x)).double().sum(1).cpu())

        return hook

    hooks = [base.model.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in sums]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
