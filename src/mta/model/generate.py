"""Decode rows of different people in one batch, each with the adapters of its person."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

import torch
from torch import Tensor

from mta.lora.layers import Adapters, applied
from mta.model.base import BaseModel
from mta.system.device import moved


@torch.inference_mode()
def generate(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    owners: Sequence[int],
    adapters: Sequence[Adapters],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    tokens_per_batch: int = 8192,
) -> list[list[int]]:
    """Continue each prompt with the adapters of its owner; return the new tokens, without the end token.

    Greedy by default. Samples depend on ``seed`` and on all rows of the call, and use no global generator.
    Rows are padded on the left and sorted by length into batches. Up to rounding, greedy answers do not depend on which
    rows share a batch. A base that is not ``packable`` may ignore padding, so its batches hold prompts of one length.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    stops, pad = base.stop_tokens, base.pad_token
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad, do_sample=False)
    drawn = LogitsProcessorList([_drawn(temperature, seed, base.device)] if temperature > 0 else [])
    while order:
        longest = len(prompts[order[-1]])
        fit = max(tokens_per_batch // (longest + max_new_tokens), 1)
        if not base.packable:
            fit = min(fit, sum(len(prompts[i]) == longest for i in order))
        order, chosen = order[:-fit], sorted(order[-fit:])
        padding = [longest - len(prompts[i]) for i in chosen]
        rows = [[pad] * more + list(prompts[i]) for more, i in zip(padding, chosen)]
        seen = [[0] * more + [1] * (longest - more) for more in padding]
        tokens, mask = moved(base.device, torch.tensor(rows), torch.tensor(seen))
        with applied(base.model, adapters, torch.tensor([owners[i] for i in chosen])):
            how = {"generation_config": config, "logits_processor": drawn}
            whole = base.model.generate(input_ids=tokens, attention_mask=mask, **how)
        for i, row in zip(chosen, whole[:, tokens.shape[1] :].tolist()):
            answers[i] = list(takewhile(lambda token: token not in stops, row))
    return answers


def _drawn(temperature: float, seed: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a processor of logits whose largest results are samples, by the Gumbel-max trick.

    Transformers would draw from torch's global generator, which other threads use, too.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def processed(_: Tensor, logits: Tensor) -> Tensor:
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
        return logits.float() / temperature - noise.log()

    return processed
