"""Scores a fixed set of answers while an engine decodes: each shared beginning is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mta.system.device import moved


class LabelWalk:
    """LayerTotals log p over the tokens of each label, along the tree of the labels' beginnings.

    A label "1, end" and a label "12, end" share the beginning "1". Beginnings are visited depth first, so an engine
    with one row of keys and values can go back to a shared beginning and continue from there.
    """

    def __init__(self, labels: Sequence[Sequence[int]]) -> None:
        self.labels = [tuple(label) for label in labels]
        self.scores = [0.0] * len(self.labels)
        # In lexicographic order, a beginning comes right before everything that continues it: depth first.
        self._left = sorted({label[:count] for label in self.labels for count in range(len(label))}, reverse=True)

    @property
    def wanted(self) -> list[int]:
        """The tokens whose log p is needed behind the current beginning, which is empty at first."""
        return [token for _, token in self._after()]

    def _after(self) -> list[tuple[int, int]]:
        """Return the number and the next token of each label that continues the current beginning."""
        start = self._left[-1]
        longer = [(n, label) for n, label in enumerate(self.labels) if len(label) > len(start)]
        return [(n, label[len(start)]) for n, label in longer if label[: len(start)] == start]

    def next(self, logits: Tensor) -> tuple[int, int] | None:
        """Take the logits (V,) behind the current beginning.

        Returns how many tokens of it to keep, and the token to continue with; None when all labels are scored.
        """
        after, _ = self._after(), self._left.pop()
        (tokens,) = moved(logits.device, torch.tensor([token for _, token in after]))
        logprobs = logits.float().log_softmax(-1)[tokens].tolist()  # a GPU sends only these
        for (number, _), logprob in zip(after, logprobs):
            self.scores[number] += logprob
        if not self._left:
            return None
        return len(self._left[-1]) - 1, self._left[-1][-1]
