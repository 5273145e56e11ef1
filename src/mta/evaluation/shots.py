"""What all methods share: the models and settings, people's shots, and stage 2 on them, each computed once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from mta.bank.bank import Bank
from mta.config import MergeSettings, Run, parse_size
from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.evaluation.module_inputs import mean_inputs
from mta.model.base import BaseModel
from mta.model.encoders import Encoder, encode_people
from mta.personalize.likelihoods import Evidence, Labels, ShotsJob, gather_evidence, shots_of
from mta.personalize.merge import Merge, fit_merge, frozen_numbers, needs_evidence
from mta.system.atomic import write_tensors
from mta.system.progress import OnStep
from mta.training.plan import Plan, plan_cohorts

ITEMS_PER_ANCHOR = 32  # latest items of an anchor that its mean inputs are computed from


@dataclass(frozen=True)
class Context:
    """What all panels over one bank share: a base, the bank, and the settings of a run.

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


@dataclass(frozen=True)
class Fold:
    """Some shots of other people: row i holds only ``shots[i]`` of person ``owners[i]`` of ``whole``."""

    whole: Shots
    owners: Sequence[int]
    shots: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Shots:
    """A few items of each person, oldest first, worded by ``task``, and stage 2 on them.

    With ``fold`` the evidence is selected from that of all shots.
    """

    context: Context
    people: Sequence[Person]
    task: Task
    fold: Fold | None = None
    merges: dict[tuple[str, int], tuple[Merge, float]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def jobs(self) -> list[ShotsJob]:
        """The shots as training examples."""
        return [shots_of(self.context.base, self.task, person) for person in self.people]

    def plan(self, numbers: int, merge: MergeSettings | None = None) -> Plan:
        """Return cohorts that fit the memory, to train ``numbers`` numbers per person, over the merge if given."""
        below = frozen_numbers(self.context.bank, merge)
        return plan_cohorts(self.context.base, self.jobs, numbers, parse_size(self.context.run.memory), below=below)

    @cached_property
    def vectors(self) -> Tensor:
        """Each person's shots as one vector, (U, E)."""
        context = self.context
        return encode_people(context.encoder, context.bank.task, self.people, context.bank.info.run.bank.encode)

    @cached_property
    def similarity(self) -> Tensor:
        """Cosine of people and anchors, (U, N)."""
        return self.context.bank.similarity(self.vectors)

    @cached_property
    def evidence(self) -> tuple[Evidence, float]:
        """Likelihood of the shots under every anchor, and the seconds that gathering it took."""
        if self.fold:  # the seconds are those of the panel with all shots
            return self.fold.whole.evidence[0].kept(self.fold.owners, self.fold.shots), 0.0
        context, path = self.context, self._evidence_file()
        if path and path.is_file():
            return _read_evidence(path)
        start = time.monotonic()
        found = gather_evidence(
            context.base, self.jobs, context.bank.working, context.bank.pooled, on_step=context.on_step
        )
        seconds = time.monotonic() - start
        if path:
            labels = {"labels": found.labels.scores, "gold": found.labels.gold} if found.labels else {}
            tensors = {"shots": found.shots, "counts": found.counts} | labels
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            write_tensors(path, contiguous, {"seconds": repr(seconds)})
        return found, seconds

    def merge(self, settings: MergeSettings, seed: int) -> tuple[Merge, float]:
        """Return everybody's merge, and the seconds that fitting it took, evidence included."""
        key = (settings.model_dump_json(), seed if settings.policy == "learned" else 0)
        if key not in self.merges:
            evidence, gathering = self.evidence if needs_evidence(settings) else (None, 0.0)
            start, context, bank = time.monotonic(), self.context, self.context.bank
            merge = fit_merge(
                context.base,
                self.jobs,
                bank.working,
                bank.pooled,
                settings,
                similarity=self.similarity,
                evidence=evidence,
                seed=seed,
                tokens_per_batch=self.plan(len(bank), settings).tokens_per_batch,
                on_step=context.on_step,
            )
            self.merges[key] = merge, time.monotonic() - start + gathering
        return self.merges[key]

    def _evidence_file(self) -> Path | None:
        """Return the file of the evidence; its name is a hash of everything that determines the evidence."""
        if self.context.evidence_folder is None:
            return None
        base, keys = self.context.base, [job.key for job in self.jobs]
        parts = [self.context.bank.hash, str(base.dtype), base.prompts.max_tokens, *keys]
        name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
        return self.context.evidence_folder / f"evidence-{name}.safetensors"


def _read_evidence(path: Path) -> tuple[Evidence, float]:
    with safe_open(path, "pt") as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}
        seconds = float(file.metadata()["seconds"])
    labels = Labels(tensors["labels"], tensors["gold"]) if "labels" in tensors else None
    return Evidence(tensors["shots"], tensors["counts"], labels), seconds
