"""The shots of a panel's people, and stage 2 on them: evidence and merges, each computed once for all methods."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

from mta.config import MergeSettings, parse_size
from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.evaluation.context import Context
from mta.model.encoders import encode_people
from mta.personalize.likelihoods import Evidence, Labels, ShotsJob, gather_evidence, shots_of
from mta.personalize.merge import Merge, fit_merge, frozen_numbers, needs_evidence
from mta.system.atomic import write_tensors
from mta.training.plan import Plan, plan_cohorts


class TimedEvidence(NamedTuple):
    """Evidence, and the seconds that gathering it took."""

    evidence: Evidence
    seconds: float


class TimedMerge(NamedTuple):
    """Everybody's merge, and the seconds that fitting it took, evidence included."""

    merge: Merge
    seconds: float


@dataclass(frozen=True)
class Shots:
    """A few items of each person, oldest first, and the task that words their prompts."""

    context: Context
    people: Sequence[Person]
    task: Task

    @cached_property
    def jobs(self) -> list[ShotsJob]:
        """The shots as training examples."""
        return [shots_of(self.context.base, self.task, person) for person in self.people]

    def plan(self, numbers: int, merge: MergeSettings | None = None) -> Plan:
        """Return cohorts that fit the memory, to train ``numbers`` numbers per person, over the merge if given."""
        below = frozen_numbers(self.context.bank, merge)
        return plan_cohorts(self.context.base, self.jobs, numbers, parse_size(self.context.run.memory), below=below)


@dataclass(frozen=True)
class Fold:
    """Some shots of another panel's people: row i holds only ``shots[i]`` of person ``owners[i]``."""

    whole: Stage2
    owners: Sequence[int]
    shots: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Stage2:
    """Evidence and merges of some shots. With ``fold`` the evidence is selected from that of all shots."""

    shots: Shots
    fold: Fold | None = None
    merges: dict[tuple[str, int], TimedMerge] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def vectors(self) -> Tensor:
        """Each person's shots as one vector, (U, E)."""
        context, encode = self.shots.context, self.shots.context.bank.info.run.bank.encode
        return encode_people(context.encoder, context.bank.task, self.shots.people, encode)

    @cached_property
    def similarity(self) -> Tensor:
        """Cosine of people and anchors, (U, N)."""
        return self.shots.context.bank.similarity(self.vectors)

    @cached_property
    def gathered(self) -> TimedEvidence:
        """Likelihood of the shots under every anchor; read from ``evidence_folder`` if an earlier run gathered it."""
        if self.fold:  # the panel with all shots counts the seconds
            return TimedEvidence(self.fold.whole.gathered.evidence.kept(self.fold.owners, self.fold.shots), 0.0)
        context, jobs = self.shots.context, self.shots.jobs
        path = _evidence_file(context, jobs)
        if path and path.is_file():
            return load_evidence(path)
        start, bank = time.monotonic(), context.bank
        evidence = gather_evidence(context.base, jobs, bank.working, bank.pooled, on_step=context.on_step)
        found = TimedEvidence(evidence, time.monotonic() - start)
        if path:
            save_evidence(path, found)
        return found

    def merge(self, settings: MergeSettings, seed: int) -> TimedMerge:
        """Return everybody's merge. A merge with the same settings is fitted once."""
        key = (settings.model_dump_json(), seed if settings.policy == "learned" else 0)
        if key not in self.merges:
            gathered = self.gathered if needs_evidence(settings) else None
            start, context, jobs = time.monotonic(), self.shots.context, self.shots.jobs
            bank = context.bank
            merge = fit_merge(
                context.base,
                jobs,
                bank.working,
                bank.pooled,
                settings,
                similarity=self.similarity,
                evidence=gathered.evidence if gathered else None,
                seed=seed,
                tokens_per_batch=self.shots.plan(len(bank), settings).tokens_per_batch,
                on_step=partial(context.on_step, "coefficients") if context.on_step else None,
            )
            seconds = time.monotonic() - start + (gathered.seconds if gathered else 0.0)
            self.merges[key] = TimedMerge(merge, seconds)
        return self.merges[key]


def _evidence_file(context: Context, jobs: Sequence[ShotsJob]) -> Path | None:
    """Return the file of the evidence; its name is a hash of everything that determines the evidence."""
    if context.evidence_folder is None:
        return None
    base = context.base
    parts = [context.bank.hash, str(base.dtype), base.prompts.max_tokens, *(job.key for job in jobs)]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    return context.evidence_folder / f"evidence-{name}.safetensors"


def save_evidence(path: Path, gathered: TimedEvidence) -> None:
    """Write evidence and its seconds to a file."""
    evidence = gathered.evidence
    tensors = {"shots": evidence.shots, "counts": evidence.counts}
    if evidence.labels:
        tensors |= {"labels": evidence.labels.scores, "gold": evidence.labels.gold}
    metadata = {"seconds": repr(gathered.seconds)}
    write_tensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def load_evidence(path: Path) -> TimedEvidence:
    """Read a file that ``save_evidence`` wrote."""
    with safe_open(path, "pt") as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}
        seconds = float(file.metadata()["seconds"])
    labels = Labels(tensors["labels"], tensors["gold"]) if "labels" in tensors else None
    return TimedEvidence(Evidence(tensors["shots"], tensors["counts"], labels), seconds)
