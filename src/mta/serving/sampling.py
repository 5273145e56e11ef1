"""Samples a token from next-token logits, with each request's own settings."""

from __future__ import annotations

import torch
from torch import Tensor

from mta.serving.engine import EngineRequest, Token

COLDEST = 1e-3  # lower temperatures are greedy: dividing by less could overflow


class Sampler:
    """Samples the tokens of one answer with its own random generator, so that other rows have no influence."""

    def __init__(self, ask: EngineRequest) -> None:
        self.ask = ask
        self._generator = torch.Generator()
        if ask.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(ask.seed)

    def token(self, logits: Tensor, likeliest: int) -> Token:
        """Return the token that follows ``logits`` (V,); ``likeliest`` is the index of the largest logit."""
        ask = self.ask
        id = likeliest if ask.temperature < COLDEST else self._drawn(logits)
        if ask.top_logprobs is None:
            return Token(id)
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(ask.top_logprobs)
        return Token(id, float(logprobs[id]), tuple(zip(top.indices.tolist(), top.values.tolist())))

    def _drawn(self, logits: Tensor) -> int:
        probabilities = (logits.float() / self.ask.temperature).softmax(-1).cpu()
        if self.ask.top_p < 1:
            ordered, ids = probabilities.sort(descending=True)
            ordered[1:][(ordered.cumsum(-1) - ordered)[1:] >= self.ask.top_p] = 0  # the likeliest token always stays
            return int(ids[torch.multinomial(ordered, 1, generator=self._generator)])
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
