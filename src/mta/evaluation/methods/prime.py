"""PriME-style: search a few coefficients with an evolution strategy, without gradients."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mta.config import MergeSettings
from mta.evaluation.methods.merged import answered
from mta.evaluation.methods.method import Method, Outcome, register
from mta.evaluation.protocol import Panel
from mta.personalize.merge import Merge, merged
from mta.system.extras import require
from mta.training.scoring import log_likelihood


@register
class Prime(Method):
    """CMA-ES over the coefficients of the ``k`` nearest anchors; each person has ``budget`` evaluations of the shots.

    All people take their steps together, so an evaluation is one pass for all. Coefficients stay in [-1.5, 1.5].
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2503.18008"
    method: Literal["prime"] = "prime"
    name: str = "PriME-style"
    k: int = 3
    budget: int = 10
    bound: float = 1.5
    sigma: float = 0.3

    @property
    def seeded(self) -> bool:
        return True

    def run(self, panel: Panel, seed: int) -> Outcome:
        require("eval", "cma")
        import cma

        k = min(self.k, len(panel.bank))
        settings = MergeSettings(policy="uniform", k=k)
        start_merge, seconds = panel.merge(settings, seed)
        start = time.monotonic()
        options = {"bounds": [-self.bound, self.bound], "verbose": -9, "seed": np.nan}
        searches = [
            cma.CMAEvolutionStrategy(w, self.sigma, options | {"randn": _normal_draws(seed, job.key)})
            for w, job in zip(start_merge.w.tolist(), panel.jobs)
        ]
        best, least = start_merge.w.clone(), self._losses(panel, start_merge, settings)
        evaluations = 1
        while evaluations < self.budget:
            candidates = [search.ask() for search in searches]
            losses = []
            for turn in range(min(len(candidates[0]), self.budget - evaluations)):
                w = torch.tensor(np.stack([own[turn] for own in candidates])).to(start_merge.w)
                found = self._losses(panel, Merge(start_merge.ids, w), settings)
                better = found < least
                best[better], least[better] = w[better], found[better]
                losses.append(found)
            evaluations += len(losses)
            if len(losses) == len(candidates[0]):  # otherwise the budget is spent
                for u, search in enumerate(searches):
                    search.tell(candidates[u], [float(loss[u]) for loss in losses])
        return answered(panel, Merge(start_merge.ids, best), settings, seconds + time.monotonic() - start)

    @staticmethod
    def _losses(panel: Panel, merge: Merge, settings: MergeSettings) -> Tensor:
        """Return the loss of each person's shots under their merge, (U,)."""
        adapters = [*panel.bank.pooled, merged(panel.bank, merge, settings)]
        found = log_likelihood(panel.base, [job.examples for job in panel.jobs], adapters)
        return torch.stack([-scores.sum() for scores in found])


def _normal_draws(seed: int, person: str) -> Callable[..., npt.NDArray[np.float64]]:
    """Return normal draws that depend on the seed and the person only; the library shares one source by default."""
    digest = hashlib.sha256(f"{seed}/{person}".encode()).digest()
    source = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return lambda *shape: source.standard_normal(shape)
