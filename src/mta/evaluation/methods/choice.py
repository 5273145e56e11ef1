"""Never worse than not personalizing: for each person, what did best on their own held-out shots."""

from __future__ import annotations

from collections.abc import Sequence
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
    """A choice among ``candidates``, the first of which is what nobody needs a reason for: the pooled model.

    Shots are held out in ``folds`` turns; another candidate is taken only if its mean loss on them is lower by
    ``margin`` standard errors, and then the one that is lowest. With one shot nothing can be held out: the first stays.
    Its seconds are those of all candidates, with what they share (a merge) in each: an upper bound.
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
        kept = [outcomes[pick].bytes_per_person for pick in picks]
        return Outcome(
            [outcomes[pick].answers[u] for u, pick in enumerate(picks)],
            seconds + sum(outcome.seconds for outcome in outcomes),
            sum(kept) / len(kept),
            chosen=tuple(self.candidates[pick].name for pick in picks),
        )

    def _picks(self, panel: Panel, seed: int) -> tuple[list[int], float]:
        """Everybody's candidate, and the seconds of asking their history."""
        asked, whose = panel.folds(self.folds)
        if not whose:
            return [0] * len(panel.people), 0.0
        outcomes = [candidate.run(asked, seed) for candidate in self.candidates]
        losses: list[list[Tensor]] = [[] for _ in panel.people]
        for row, u in enumerate(whose):
            theirs = [query_nll(asked.task, outcome.answers[row], asked.golds[row]) for outcome in outcomes]
            losses[u].append(torch.stack([nll for nll in theirs if nll is not None]))
        found = [pick(torch.cat(theirs, 1), self.margin) if theirs else 0 for theirs in losses]
        return found, sum(outcome.seconds for outcome in outcomes)


def pick(losses: Tensor, margin: float) -> int:
    """Which of the candidates to take. Shapes: losses (candidates, shots), the first row is what needs no reason."""
    gains = losses[0] - losses[1:]
    shots = gains.shape[1]
    error = gains.std(1) / shots**0.5 if shots > 1 else torch.zeros(len(gains))
    sure = gains.mean(1) - margin * error
    means: Sequence[float] = [0.0, *torch.where(sure > 0, gains.mean(1), -1.0).tolist()]
    return max(range(len(means)), key=lambda i: means[i])
