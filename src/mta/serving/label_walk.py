"""Scores a fixed set of answers while an engine decodes: each shared beginning is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mta.system.device import moved


class LabelWalk:
    """Sums log p over the tokens of each label, along the tree of the labels' beginnings.

    A label "1, end" and a label "12, end" share the beginning "1". Beginnings are visited depth first, so an engine
    with one row of keys and values can go back to a shared beginning and continue from there.
    """

    def __init__(self, labels: Sequence[Sequence[int]]) -> None:
        self.labels = [tuple(label) for label in labels]
        self.scores = [0.0] * len(self.labels)
        # In lexicographic order, a beginning comes right before everything that continues it: depth first.
        self._left = sorted({label[:count] for label in self.labels for count in range(len(label))}, reverse=True)

    def next(self, logits: Tensor) -> tuple[int, int] | None:
        """Take the logits (V,) behind the current beginning, which is empty at first.

        Returns how many tokens of it to keep, and the token to continue with; None when all labels are scored.
        """
        start = self._left.pop()
        after = [n for n, label in enumerate(self.labels) if len(label) > len(start) and label[: len(start)] == start]
        (tokens,) = moved(logits.device, torch.tensor([self.labels[n][len(start)] for n in after]))
        for number, logprob in zip(after, logits.float().log_softmax(-1)[tokens].tolist()):  # a GPU sends only these
            self.scores[number] += logprob
        if not self._left:
            return None
        return len(self._left[-1]) - 1, self._left[-1][-1]
