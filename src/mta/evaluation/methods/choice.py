"""Choose a method for each person: the one that did best on the person's held-out shots."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mta.evaluation.methods.merged import Merged, MergeThenAdapt
from mta.evaluation.methods.method import AnyMethod, Method, Outcome, register
from mta.evaluation.methods.plain import TaskLora
from mta.evaluation.metrics import query_nll
from mta.evaluation.protocol import Panel


@register
class Chosen(Method):
    """Choose among ``candidates``; the first is the default, which does not personalize.

    Shots are held out in ``folds`` turns. Another candidate is chosen only if its mean loss on them is lower than that
    of the default by ``margin`` standard errors; among several, the lowest. With one shot, the default stays.
    The seconds are the sum over candidates, which counts a shared merge several times: an upper bound.
    Source: our choice.
    """

    method: Literal["choice"] = "choice"
    name: str = "MTA, chosen"
    candidates: tuple[AnyMethod, ...] = (TaskLora(), Merged(), MergeThenAdapt())
    folds: int = 4
    margin: float = 0.5

    @property
    def seeded(self) -> bool:
        return any(candidate.seeded for candidate in self.candidates)

    def run(self, panel: Panel, seed: int) -> Outcome:
        picks, seconds = self._picks(panel, seed)
        outcomes = [candidate.outcome(panel, seed) for candidate in self.candidates]
        stored = [outcomes[pick].bytes_per_person for pick in picks]
        return Outcome(
            [outcomes[pick].answers[u] for u, pick in enumerate(picks)],
            seconds + sum(outcome.seconds for outcome in outcomes),
            sum(stored) / len(stored),
            chosen=tuple(self.candidates[pick].name for pick in picks),
        )

    def _picks(self, panel: Panel, seed: int) -> tuple[list[int], float]:
        """Return the number of each person's candidate, and the seconds of trying the candidates on held-out shots."""
        folds, owners = panel.folds(self.folds)
        if not owners:
            return [0] * len(panel.people), 0.0
        outcomes = [candidate.run(folds, seed) for candidate in self.candidates]
        losses: list[list[Tensor]] = [[] for _ in panel.people]
        for row, u in enumerate(owners):
            held_out = [query_nll(folds.task, outcome.answers[row], folds.golds[row]) for outcome in outcomes]
            losses[u].append(torch.stack([nll for nll in held_out if nll is not None]))
        picks = [pick(torch.cat(rows, 1), self.margin) if rows else 0 for rows in losses]
        return picks, sum(outcome.seconds for outcome in outcomes)


def pick(losses: Tensor, margin: float) -> int:
    """Return the number of the candidate to use. Shapes: losses (candidates, shots); the first row is the default."""
    gains = losses[0] - losses[1:]
    shots = gains.shape[1]
    error = gains.std(1) / shots**0.5 if shots > 1 else torch.zeros(len(gains))
    sure = gains.mean(1) - margin * error
    means = [0.0, *torch.where(sure > 0, gains.mean(1), -1.0).tolist()]
    return max(range(len(means)), key=lambda i: means[i])
