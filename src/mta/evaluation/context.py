"""What all batches over one bank share: models, settings, and how evidence is gathered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mta.bank.bank import Bank
from mta.config import Run, parse_size
from mta.data.history import Person
from mta.model.base import BaseModel
from mta.model.encoders import Encoder
from mta.personalize.evidence import Evidence, gather_evidence
from mta.personalize.shots import ShotsJob
from mta.system.device import clock
from mta.system.progress import OnStep


@dataclass(frozen=True)
class Context:
    """What all batches over one bank share: a base, the bank, and the settings of a run.

    ``anchors`` are the whole histories of the anchors, in the bank's order; ``task_people`` only train the task
    LoRA. Either is empty where the histories are not known. ``evidence_of`` gathers the evidence of a batch, or reads
    it from an earlier run. ``kept`` is for values that a method computes once for all batches.
    """

    base: BaseModel
    bank: Bank
    encoder: Encoder
    run: Run
    anchors: Sequence[Person] = ()
    task_people: Sequence[Person] = ()
    on_step: OnStep | None = None
    evidence_of: Callable[[Context, Sequence[ShotsJob]], tuple[Evidence, float]] | None = None
    kept: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


def gathered_evidence(context: Context, jobs: Sequence[ShotsJob]) -> tuple[Evidence, float]:
    """Return the likelihood of the shots under every anchor, and the seconds that gathering it took."""
    base, bank = context.base, context.bank
    start = clock(base.device)
    memory, on_step = parse_size(context.run.memory), context.on_step
    evidence = gather_evidence(base, jobs, bank.device_anchors, bank.task_adapters, memory=memory, on_step=on_step)
    return evidence, clock(base.device) - start
