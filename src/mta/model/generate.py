"""Decode rows of different people in one batch, each with the adapters of its person."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import takewhile

import torch

from mta.lora.layers import Adapters, applied
from mta.model.base import BaseModel
from mta.system.device import moved, seeded


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

    Greedy by default. Sampling depends only on ``seed`` and restores torch's global generators afterwards.
    Rows are padded on the left and sorted by length into batches. Up to rounding, greedy answers do not depend on which
    rows share a batch. A base that is not ``packable`` may ignore padding, so its batches hold prompts of one length.
    """
    from transformers import GenerationConfig

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    stops, pad = base.stop_tokens, base.pad_token
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad, **sampling)
    with seeded(seed, base.device) if temperature > 0 else nullcontext():  # transformers accepts no generator
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
                whole = base.model.generate(input_ids=tokens, attention_mask=mask, generation_config=config)
            for i, row in zip(chosen, whole[:, tokens.shape[1] :].tolist()):
                answers[i] = list(takewhile(lambda token: token not in stops, row))
    return answers
