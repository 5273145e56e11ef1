"""The peer: PEFT as its documentation shows it, one person at a time, a plain loop.

It runs in a process of its own (``peer``), with torch's and glibc's defaults, as it does for everybody. Everything that
is free for it is given to it: the wrapped model is made once and only the adapter is set back for the next person; what
is frozen in ours (task LoRA, merged anchors) is folded into its base weights before timing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.adapters import lora_config, plain_model
from benchmarks.speed.apart import apart
from benchmarks.speed.timing import rate
from mta.config import Training
from mta.data.tasks.prompt import Example
from mta.lora.batch import Factors, LoraBatch
from mta.system.device import moved
from mta.training.trainer import Job, batch_of

FREE = "the peer's frozen adapters are folded into its weights beforehand, for free"
PRECISIONS = ("autocast", "adapters in bfloat16")  # of a bfloat16 base
AS_IT_COMES = "adapters in float32"  # what PEFT makes of a bfloat16 base by default
TOKENS = 2048  # padded tokens of one forward pass on CPUs; batches of long texts are split and their gradients added up


@contextmanager
def peer(dtype: str, like: LoraBatch) -> Iterator[PlainPeft]:
    """``PlainPeft`` in a process of its own, for the length of a block."""
    with apart(peer_here, dtype, like.select([0])) as one:
        yield one


def peer_here(dtype: str, like: LoraBatch) -> PlainPeft:
    """``PlainPeft`` of SmolLM2-135M in this process."""
    return PlainPeft(plain_model(dtype), like)


class PlainPeft:
    """The base model as transformers loads it, with one LoRA on ``like``'s layers, of its rank and scale."""

    def __init__(self, model: Any, like: LoraBatch) -> None:
        import peft

        self.model: Any = peft.get_peft_model(model, lora_config(like))  # float32 adapters also of a bfloat16 base
        self.model.train()
        self.scale, self.tokens, self.autocast = like.scale, TOKENS, False
        self.layers = {name: self.model.base_model.model.get_submodule(name) for name in like.names}
        self.factors = {n: (m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in self.layers.items()}
        self.parameters = [tensor for pair in self.factors.values() for tensor in pair]
        self.unfolded: dict[str, Tensor] = {}

    def compute_with(self, precision: str) -> None:
        """Compute a bfloat16 base with one of ``PRECISIONS`` or ``AS_IT_COMES``.

        With autocast, the adapters' factors stay float32.
        """
        self.autocast = precision == "autocast"
        kind = torch.bfloat16 if precision == "adapters in bfloat16" else torch.float32
        for tensor in self.parameters:
            tensor.data = tensor.data.to(kind)

    def fold(self, *frozen: LoraBatch | None) -> None:
        """Add the update of each batch's only adapter to the base weights as they were loaded."""
        with torch.no_grad():
            for name, layer in self.layers.items():
                weight = layer.base_layer.weight
                if name not in self.unfolded:  # on the host: on a GPU, there is no room for the weights of large models
                    self.unfolded[name] = weight.detach().to("cpu", copy=True)
                plain = self.unfolded[name].to(weight.device)
                one = (LoraBatch({name: part.factors[name]}, part.scale) for part in frozen if part is not None)
                update = sum(part.to(torch.float32).delta(name)[0] for part in one)
                weight.copy_(plain.float() + update)

    def begin(self, start: LoraBatch, person: int) -> None:
        """Set the adapter to where ``person`` starts."""
        with torch.no_grad():
            values = [value[person] for name in self.factors for value in start.factors[name]]
            torch._foreach_copy_(self.parameters, values)

    def prepare(self, jobs: Sequence[Job], start: LoraBatch, training: Training) -> None:
        """What ``train`` is to do; for one person it is done at once, to warm up."""
        self.work = jobs[:1], start, training
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=training.lr,
            betas=(training.beta1, training.beta2),
            eps=training.eps,
            weight_decay=training.weight_decay,
            fused=self.model.device.type == "cuda" or None,
        )
        self.train()
        self.work = jobs, start, training

    def train(self) -> None:
        """One person after the other from ``start``."""
        jobs, start, training = self.work
        for person, job in enumerate(jobs):
            self.begin(start, person)
            states = self.optimizer.state.values()  # none before the first step
            for name in next(iter(states), ()):  # a new optimizer would start a thousand kernels on a GPU
                torch._foreach_zero_([state[name] for state in states])
            for step in range(training.steps or 0):
                self.backward(batch_of(job, step, training.batch_size, 0))
                torch.nn.utils.clip_grad_norm_(self.parameters, training.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()

    def backward(self, examples: Sequence[Example]) -> Tensor:
        """Add the gradient of the mean loss over the targets' tokens; returns that loss, on the model's device."""
        total = sum(len(example.target) for example in examples)
        loss = torch.zeros((), device=self.model.device)  # a number would make a GPU wait after each part
        for part in _parts(examples, self.tokens):
            share = sum(len(example.target) for example in part) / total
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast):
                mean = self.model(**padded(part, self.model.device), use_cache=False).loss * share
            mean.backward()
            loss += mean.detach()
        return loss

    def gradient(self, jobs: Sequence[Job], start: LoraBatch) -> tuple[float, LoraBatch]:
        """Mean loss of these people, and the gradient of each adapter on all examples of its job."""
        losses, found = [], []
        for person, job in enumerate(jobs):
            self.begin(start, person)
            self.model.zero_grad()
            losses.append(float(self.backward(job.examples)))
            found.append({name: [t.grad.detach().clone() for t in pair] for name, pair in self.factors.items()})
        self.model.zero_grad()
        stacked = {n: Factors(*(torch.stack([one[n][side] for one in found]) for side in (0, 1))) for n in self.layers}
        return sum(losses) / len(losses), LoraBatch(stacked, self.scale)


def fastest(plain: PlainPeft, prepare: Callable[[], Any], among: Sequence[str]) -> str:
    """Let the peer compute with the fastest of some precisions; return which. ``prepare`` gives it work for one."""
    speeds = dict[str, float]()

    def one() -> float:
        plain.train()
        return 1.0

    for precision in among:
        plain.compute_with(precision)
        prepare()
        speeds[precision] = rate(one)
    best = max(among, key=lambda precision: speeds[precision])
    plain.compute_with(best)
    return best


def padded(examples: Sequence[Example], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A batch as a plain loop has it: padded on the right, labels -100 wherever nothing is to be learned."""
    width = max(len(example.tokens) for example in examples)
    shape = (len(examples), width)
    tokens, seen = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for n, example in enumerate(examples):
        length, start = len(example.tokens), example.target_start
        tokens[n, :length], seen[n, :length] = torch.tensor(example.tokens), 1
        labels[n, start:length] = torch.tensor(example.target)
    inputs = {"input_ids": tokens, "attention_mask": seen, "labels": labels}
    return dict(zip(inputs, moved(torch.device(device), *inputs.values())))  # without waiting for earlier passes


def _parts(examples: Sequence[Example], tokens: int) -> Iterator[list[Example]]:
    """The batch in its order, as much at a time as is at most ``tokens`` padded tokens."""
    part: list[Example] = []
    for example in examples:
        width = max(len(one.tokens) for one in [*part, example])
        if part and width * (len(part) + 1) > tokens:
            yield part
            part = []
        part.append(example)
    yield part
