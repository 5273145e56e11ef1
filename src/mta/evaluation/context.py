"""What all batches over one bank share: models and settings, and what is computed once from them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mta.bank.bank import Bank
from mta.config import Run, parse_size
from mta.data.history import Person
from mta.data.tasks.prompt import Example
from mta.lora.layers import Adapters, applied
from mta.model.base import BaseModel
from mta.model.encoders import Encoder
from mta.personalize.evidence import Evidence, Labels, gather_evidence
from mta.personalize.shots import ShotsJob, shots_of
from mta.system.atomic import json_sha256, write_tensors
from mta.system.device import clock
from mta.system.progress import OnStep

ITEMS_PER_ANCHOR = 32  # latest items of an anchor that its mean inputs are computed from


@dataclass(frozen=True)
class Context:
    """What all batches over one bank share: a base, the bank, and the settings of a run.

    ``anchors`` are the whole histories of the anchors, in the bank's order; ``task_people`` only train the task
    LoRA. Either is empty where the histories are not known. ``evidence_folder`` keeps evidence for later runs.
    """

    base: BaseModel
    bank: Bank
    encoder: Encoder
    run: Run
    anchors: Sequence[Person] = ()
    task_people: Sequence[Person] = ()
    on_step: OnStep | None = None
    evidence_folder: Path | None = None

    @cached_property
    def anchor_inputs(self) -> dict[str, Tensor]:
        """Mean input of each adapted module over the items of each anchor: name -> (N, D). Used by Per-Pcs."""
        people = [anchor.latest(ITEMS_PER_ANCHOR) for anchor in self.anchors]
        jobs = [shots_of(self.base, self.bank.task, person).examples for person in people]
        return mean_inputs(self.base, jobs, self.bank.task_adapters)


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
        total = (x * mask[..., None].to(x)).to(base.master_dtype).sum(1)
        sums[name].index_add_(0, owner, total.cpu().double())  # there: some devices have no float64

    for start in range(0, len(rows), rows_per_batch):
        people, texts = zip(*rows[start : start + rows_per_batch])
        owner = torch.tensor(people)
        tokens = pad_sequence(list(texts), batch_first=True, padding_value=base.pad_token).to(base.device)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True).to(base.device)
        counts.index_add_(0, owner, mask.sum(1, keepdim=True).cpu().double())
        with applied(base.model, adapters, owner), ExitStack() as hooks:
            for name in sums:
                module = base.model.get_submodule(name)
                hooks.enter_context(module.register_forward_pre_hook(partial(add, name, owner, mask)))
            base.model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)  # without logits
    return {name: total / counts for name, total in sums.items()}


def evidence_of(context: Context, jobs: Sequence[ShotsJob]) -> tuple[Evidence, float]:
    """Return the likelihood of the shots under every anchor, and the seconds that gathering it took.

    Both are read from ``evidence_folder`` if an earlier run gathered them, and written there otherwise.
    """
    base, bank, path = context.base, context.bank, _evidence_file(context, jobs)
    if path and path.is_file():
        with safe_open(path, "pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}
            seconds = float(file.metadata()["seconds"])
        labels = Labels(tensors["labels"], tensors["gold"]) if "labels" in tensors else None
        return Evidence(tensors["shots"], tensors["counts"], labels), seconds
    start = clock(base.device)
    memory, on_step = parse_size(context.run.memory), context.on_step
    found = gather_evidence(base, jobs, bank.device_anchors, bank.task_adapters, memory=memory, on_step=on_step)
    seconds = clock(base.device) - start
    if path:
        tensors = {"shots": found.loglik, "counts": found.counts}
        if found.labels:
            tensors |= {"labels": found.labels.scores, "gold": found.labels.gold}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_tensors(path, contiguous, {"seconds": repr(seconds)})
    return found, seconds


def _evidence_file(context: Context, jobs: Sequence[ShotsJob]) -> Path | None:
    """Return the file of the evidence; its name is a hash of everything that determines the evidence."""
    if context.evidence_folder is None:
        return None
    base = context.base
    name = json_sha256([context.bank.hash, str(base.dtype), base.prompts.max_tokens, *(job.key for job in jobs)])[:24]
    return context.evidence_folder / f"evidence-{name}.safetensors"
