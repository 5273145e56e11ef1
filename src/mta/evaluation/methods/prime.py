"""PriME-style: an evolution strategy looks for a few coefficients, nothing is differentiated."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
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
    """CMA-ES over the coefficients of the ``k`` nearest anchors, ``budget`` looks at the loss of the shots each.

    Everybody's strategy takes its steps together, so a look is one pass for all. Coefficients stay in [-1.5, 1.5].
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
        begun, seconds = panel.merge(settings, seed)
        start = time.monotonic()
        how = {"bounds": [-self.bound, self.bound], "verbose": -9, "seed": np.nan}
        searches = [
            cma.CMAEvolutionStrategy(w, self.sigma, how | {"randn": _draws(seed, job.key)})
            for w, job in zip(begun.w.tolist(), panel.jobs)
        ]
        best, least = begun.w.clone(), self._losses(panel, begun, settings)
        looks = 1
        while looks < self.budget:
            asked = [search.ask() for search in searches]
            losses = []
            for turn in range(min(len(asked[0]), self.budget - looks)):
                tried = torch.tensor(np.stack([theirs[turn] for theirs in asked])).to(begun.w)
                found = self._losses(panel, Merge(begun.ids, tried), settings)
                better = found < least
                best[better], least[better] = tried[better], found[better]
                losses.append(found)
            looks += len(losses)
            if len(losses) == len(asked[0]):  # else the budget is spent, and nothing more would be asked
                for u, search in enumerate(searches):
                    search.tell(asked[u], [float(loss[u]) for loss in losses])
        return answered(panel, Merge(begun.ids, best), settings, seconds + time.monotonic() - start)

    @staticmethod
    def _losses(panel: Panel, merge: Merge, settings: MergeSettings) -> Tensor:
        """(U,): loss of everybody's shots under their merge."""
        adapters = [*panel.bank.pooled, merged(panel.bank, merge, settings)]
        found = log_likelihood(panel.base, [job.examples for job in panel.jobs], adapters)
        return torch.stack([-one.sum() for one in found])


def _draws(seed: int, person: str) -> Callable[..., Any]:
    """Normal draws from a source of one's own, whoever else is in the panel; the library's is one for all searches."""
    digest = hashlib.sha256(f"{seed}/{person}".encode()).digest()
    source = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return lambda *shape: source.standard_normal(shape)
