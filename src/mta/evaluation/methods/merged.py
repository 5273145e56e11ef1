"""Stage 2 alone, and MTA itself: stage 2 with the stack on top."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from mta.bank.selection import select_anchors
from mta.config import MergeSettings, StackSettings
from mta.data.history import Item, Person
from mta.data.tasks.task import Task
from mta.evaluation.methods.answer import answer
from mta.evaluation.methods.method import Method, Outcome, register
from mta.evaluation.methods.trained import adapted
from mta.evaluation.metrics import Answers
from mta.evaluation.protocol import Panel
from mta.personalize.merge import Merge, coefficients, learn, merged

MTA = "https://arxiv.org/abs/2511.20072"


@register
class Merged(Method):
    """Stage 2 alone: a merge of the bank. Only anchor numbers and coefficients are stored."""

    paper: ClassVar[str] = MTA
    method: Literal["merge"] = "merge"
    name: str = "merge only"
    merge: MergeSettings | None = None
    anchors: int | None = None  # merge as if the bank held only this many anchors

    def fits(self, task: Task, anchors: int) -> bool:
        return _fits(self.merge, task, anchors) and (self.anchors or 0) <= anchors

    @property
    def seeded(self) -> bool:
        return self.merge is None or self.merge.policy == "learned"

    def run(self, panel: Panel, seed: int) -> Outcome:
        settings = self.merge or panel.run.merge
        if self.anchors is None:
            merge, seconds = panel.merge(settings, seed)
        else:
            merge, seconds = _among(panel, settings, self.anchors)
        return answered(panel, merge, settings, seconds)


@register
class MergedByLayer(Method):
    """The learned policy with separate coefficients for each of ``groups`` equally deep groups of layers."""

    method: Literal["merge-by-layer"] = "merge-by-layer"
    name: str = "merge only, by layer"
    merge: MergeSettings | None = None
    groups: int = 3

    @property
    def seeded(self) -> bool:
        return True

    def run(self, panel: Panel, seed: int) -> Outcome:
        settings = self.merge or panel.run.merge
        first, seconds = panel.merge(settings.model_copy(update={"policy": "posterior"}), seed)
        start, bank = time.monotonic(), panel.bank
        merge = learn(
            panel.base,
            panel.jobs,
            bank.working,
            bank.pooled,
            replace(first, w=first.w.to(panel.base.master_dtype)),
            settings.learned,
            layer_groups(bank.working.names, self.groups),
            seed=seed,
            tokens_per_batch=panel.plan(self.groups * len(bank), settings).tokens_per_batch,
        )
        return answered(panel, merge, settings, seconds + time.monotonic() - start)


@register
class MergeThenAdapt(Method):
    """MTA: stage 2, then the stack on top of it."""

    paper: ClassVar[str] = MTA
    method: Literal["mta"] = "mta"
    name: str = "MTA"
    merge: MergeSettings | None = None
    stack: StackSettings | None = None

    def fits(self, task: Task, anchors: int) -> bool:
        return _fits(self.merge, task, anchors)

    @property
    def seeded(self) -> bool:
        return True

    def run(self, panel: Panel, seed: int) -> Outcome:
        settings, stack = self.merge or panel.run.merge, self.stack or panel.run.stack
        merge, seconds = panel.merge(settings, seed)
        found = adapted(panel, merge, settings, stack.lora, stack.training, seed, self.name)
        stored = found.bytes_per_person + bytes_of(merge)
        return replace(found, seconds=seconds + found.seconds, bytes_per_person=stored)


def answered(panel: Panel, merge: Merge, settings: MergeSettings, seconds: float) -> Outcome:
    """Answer the panel's queries with everybody's merge over the task LoRA, in the mode of ``settings``."""
    answers: list[Answers] = []
    settings = settings.model_copy(update={"k": merge.ids.shape[1]})  # the memory plan must count the merged anchors
    for cohort in panel.plan(1, settings).cohorts:
        answers += answer(panel, cohort, [*panel.bank.pooled, merged(panel.bank, merge.select(cohort), settings)])
    return Outcome(answers, seconds, bytes_of(merge), merge)


def bytes_of(merge: Merge) -> float:
    """Return the bytes of one person's merge as JSON: anchor numbers, and coefficients once per group of layers."""
    w = merge.w[0] if merge.w.ndim == 2 else torch.unique_consecutive(merge.w[0], dim=0)
    return len(json.dumps([merge.ids[0].tolist(), w.tolist()]))


def layer_groups(names: Sequence[str], groups: int) -> list[int]:
    """Return the group of each adapted layer: ranges of equal depth, numbered from the input on."""
    blocks = [int(found[0]) if (found := re.findall(r"\d+", name)) else 0 for name in names]
    depth = max(blocks) + 1
    return [block * min(groups, depth) // depth for block in blocks]


def _fits(settings: MergeSettings | None, task: Task, anchors: int) -> bool:
    return settings is None or (settings.k <= anchors and (task.labelled or settings.policy != "ridge"))


def _among(panel: Panel, settings: MergeSettings, count: int) -> tuple[Merge, float]:
    """Merge only ``count`` of the bank's anchors, selected as the bank's anchors were selected from candidates.

    Works for policies that read evidence or encodings; a policy that learns needs a smaller bank.
    """
    bank = panel.bank
    if count >= len(bank):
        return panel.merge(settings, 0)
    # Selects the most active anchor of each cluster: only the lengths of histories matter.
    actives = [Person(f"{n:04}", (Item({}),) * items) for n, items in enumerate(bank.info.items)]
    chosen = select_anchors(actives, bank.vectors, count, 0, share=1)
    start = time.monotonic()
    found = coefficients(settings, panel.similarity[:, chosen], panel.evidence.among(chosen))
    merge = Merge(torch.tensor(chosen)[found.ids], found.w.to(panel.base.master_dtype))
    share = panel.evidence_seconds * (len(chosen) + 1) / (len(bank) + 1)
    return merge, time.monotonic() - start + share
