"""AdamW for U adapters in one buffer, each with its own step count, learning rate, and gradient norm."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mta.config import Training
from mta.kernels.compile import kernels
from mta.system.device import moved

_CHUNK = 2**14  # columns per operation on a CPU, so that the operands of an update stay in the CPU cache


@dataclass(slots=True)
class BatchedAdamW:
    """AdamW over the rows of ``values`` (U, P); each row is updated as by a separate ``torch.optim.AdamW``.

    Shapes: values, gradient, mean, square (U, P); step (U,), on the CPU.
    """

    values: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    step: Tensor

    @classmethod
    def of(cls, values: Tensor) -> BatchedAdamW:
        zeros = [torch.zeros_like(values) for _ in range(3)]
        return cls(values.contiguous(), zeros[0], zeros[1], zeros[2], torch.zeros(len(values), dtype=torch.long))

    def update(self, lr: Tensor, training: Training) -> None:
        """Clip each row's gradient, take one step at its own ``lr`` (U,), and zero the gradients. lr is on the CPU."""
        self.step += 1
        count, rate = self.step.to(self.values.dtype), lr.to(self.values.dtype)
        clip = (training.clip / (self.gradient.norm(dim=1) + 1e-6)).clamp_max(1.0)  # as torch.nn.utils.clip_grad_norm_
        size = rate / (1 - training.beta1**count)
        correction = (1 - training.beta2**count).sqrt()
        decay = 1 - rate * training.weight_decay
        size, correction, decay = moved(self.values.device, size, correction, decay)
        if found := kernels("adamw", self.values):
            places = (buffer.data_ptr() for buffer in (*self._buffers, clip, size, correction, decay))
            found["adamw"](*places, *self.values.shape, training.beta1, training.beta2, training.eps)
        else:
            self._plain_update(clip, size, correction, decay, training)

    def _plain_update(self, clip: Tensor, size: Tensor, correction: Tensor, decay: Tensor, training: Training) -> None:
        size, correction, decay = size[:, None], correction[:, None], decay[:, None]
        self.gradient.mul_(clip[:, None])
        columns = self.values.shape[1]
        chunk = _CHUNK if self.values.device.type == "cpu" else max(columns, 1)  # a GPU pays for every kernel launch
        for start in range(0, columns, chunk):
            window = slice(start, start + chunk)
            values, gradient, mean, square = (buffer[:, window] for buffer in self._buffers)
            mean.lerp_(gradient, 1 - training.beta1)
            square.mul_(training.beta2).addcmul_(gradient, gradient, value=1 - training.beta2)
            spread = square.sqrt().div_(correction).add_(training.eps)
            values.mul_(decay).sub_((size * mean).div_(spread))
        self.gradient.zero_()

    def keep(self, rows: Tensor) -> None:
        """Keep only ``rows``, numbers on the CPU. One buffer is copied at a time: memory is planned for no more."""
        (there,) = moved(self.values.device, rows)
        self.values = self.values[there]
        self.gradient = self.gradient[there]
        self.mean = self.mean[there]
        self.square = self.square[there]
        self.step = self.step[rows]

    @property
    def _buffers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.values, self.gradient, self.mean, self.square


def learning_rate(training: Training, step: int, steps: int, examples: int, examples_before: int = 0) -> float:
    """Return the rate of 0-based ``step`` of ``steps``, for a job with that many examples.

    Linear warmup, then constant, linear, or cosine decay to 0. With ``training.lr_shrink_examples``, few examples lower
    it, and so do ``examples_before`` that the adapter was trained on already: the rates of its updates add up to that
    of all its examples at once.
    """
    lr, shrink = training.lr, training.lr_shrink_examples
    if shrink:
        before = examples_before
        lr *= (before + examples) / (before + examples + shrink) - before / (before + shrink)
    warmup = math.ceil(training.warmup * steps)
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    if training.schedule == "linear":
        return lr * (1 - done)
    if training.schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * done))
    return lr
