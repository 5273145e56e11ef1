"""What all panels over one bank share: the models, the settings, and the people behind the bank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from mta.bank.bank import Bank
from mta.config import Run
from mta.data.history import Person
from mta.evaluation.module_inputs import mean_inputs
from mta.model.base import BaseModel
from mta.model.encoders import Encoder
from mta.personalize.likelihoods import shots_of
from mta.system.progress import OnStep

ITEMS_PER_ANCHOR = 32  # latest items of an anchor that its mean inputs are computed from


@dataclass(frozen=True)
class Context:
    """A base, a bank, and the settings of a run.

    ``anchors`` are the whole histories of the anchors, in the bank's order; ``pool`` are the people behind the task
    LoRA. Either is empty where the histories are not known. ``evidence_folder`` keeps evidence for later runs.
    """

    base: BaseModel
    bank: Bank
    encoder: Encoder
    run: Run
    anchors: Sequence[Person] = ()
    pool: Sequence[Person] = ()
    on_step: OnStep | None = None
    evidence_folder: Path | None = None

    @cached_property
    def anchor_inputs(self) -> dict[str, Tensor]:
        """Mean input of each adapted module over the items of each anchor: name -> (N, D). Used by Per-Pcs."""
        people = [anchor.latest(ITEMS_PER_ANCHOR) for anchor in self.anchors]
        jobs = [shots_of(self.base, self.bank.task, person).examples for person in people]
        return mean_inputs(self.base, jobs, self.bank.pooled)
