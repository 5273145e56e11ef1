"""From next-token logits to tokens, row by row as each was asked."""

from __future__ import annotations

import torch
from torch import Tensor

from mta.serving.engine import Ask, Token

COLDEST = 1e-3  # temperatures below are greedy; dividing by less would leave the numbers' range


class Sampler:
    """Draws the tokens of one answer from a source of its own: nobody else's rows decide what it draws."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self._draw = torch.Generator()
        if ask.seed is None:
            self._draw.seed()
        else:
            self._draw.manual_seed(ask.seed)

    def token(self, logits: Tensor, likeliest: int) -> Token:
        """The next token after ``logits`` (V,), whose largest is at ``likeliest``."""
        ask = self.ask
        id = likeliest if ask.temperature < COLDEST else self._drawn(logits)
        if ask.top_logprobs is None:
            return Token(id)
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(ask.top_logprobs)
        return Token(id, float(logprobs[id]), tuple(zip(top.indices.tolist(), top.values.tolist())))

    def _drawn(self, logits: Tensor) -> int:
        shares = (logits.float() / self.ask.temperature).softmax(-1).cpu()
        if self.ask.top_p < 1:
            ordered, places = shares.sort(descending=True)
            ordered[1:][(ordered.cumsum(-1) - ordered)[1:] >= self.ask.top_p] = 0  # the likeliest stays, whatever top_p
            return int(places[torch.multinomial(ordered, 1, generator=self._draw)])
        return int(torch.multinomial(shares, 1, generator=self._draw))
