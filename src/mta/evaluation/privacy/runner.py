"""Membership inference on a bank: measure how well the loss separates training items from other items.

PriME (arXiv:2503.18008) tests merged models by attacks of this kind. The protocol here is our choice;
docs/explanation/privacy.md lists what it does not cover.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mta.bank.bank import Bank
from mta.config import MergeSettings, Privacy, Run
from mta.data.history import Person
from mta.evaluation.context import Context
from mta.evaluation.methods import Merged, MergeThenAdapt
from mta.evaluation.privacy.evaluator import (
    ANCHORS,
    PERSONAL,
    POOL,
    SHOTS,
    MembershipEvaluator,
    NumberedItems,
    Pair,
    Row,
)
from mta.evaluation.privacy.membership import rank_correlation
from mta.evaluation.privacy.sampling import AttackSample, sample_people
from mta.evaluation.protocol import Panel
from mta.evaluation.statistics import Interval
from mta.model.base import BaseModel
from mta.model.encoders import Encoder
from mta.personalize.merge import check_merge
from mta.system.progress import OnStep
from mta.system.provenance import versions

KS = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Findings:
    """All rows, and Spearman's correlation of an anchor's coefficient with the attack's success over ``pairs``."""

    rows: list[Row]
    weights: Interval | None
    pairs: int
    meta: dict[str, Any]

    def outcome(self) -> dict[str, Any]:
        """Return the AUC of the strongest attack on each kind of model."""
        best = {f"{row.about}: {row.name}": max(a.auc.mean for a in row.attacks.values()) for row in self.rows}
        return {"AUC": {name: round(auc, 4) for name, auc in best.items()}}

    def row(self, about: str, name: str) -> Row:
        """Return a row by the items that it is about and its name."""
        return next(row for row in self.rows if (row.about, row.name) == (about, name))


def privacy(
    base: BaseModel,
    bank: Bank,
    run: Run,
    people: Sequence[Person],
    settings: Privacy,
    *,
    encoder: Encoder | None = None,
    on_step: OnStep | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Findings:
    """Attack a bank, its merges and personal models. ``people`` are the bank's own and others, with whole histories.

    The score of an item is minus its loss. The loss is the NLL of the true answer: among the labels if the task has
    labels, else per token. Raises InputError if people are missing, ConfigError or AnchorNotFound for a wrong merge.
    """
    check_merge(run.merge, len(bank), bank.task.labelled)
    sample = sample_people(bank, people, settings, run.seed)
    shots = [person.first(settings.shots) for person in sample.targets]
    context = Context(base, bank, encoder or bank.encoder(base, run.encoder), run, on_step=on_step)
    panel = Panel.asking(context, shots, [()] * len(shots), write_texts=False)
    items = NumberedItems.of(sample, [len(person.items) for person in shots])
    evaluator = MembershipEvaluator(panel, items, sample.trained, settings.items, say)
    references, rows = evaluator.references()
    rows += evaluator.meta_lora_rows(references)
    pairs: list[Pair] = []
    for name, merge in merges(run, len(bank)).items():
        found = evaluator.target_rows(name, Merged(merge=merge), merge, references)
        rows, pairs = [*rows, *found[0]], [*pairs, *found[1]]
    if run.stack.enabled:
        personal = MergeThenAdapt(merge=run.merge, stack=run.stack)
        rows += evaluator.target_rows(PERSONAL, personal, run.merge, references)[0]
    rows.sort(key=lambda row: (ANCHORS, POOL, SHOTS).index(row.about))
    targets, w, beaten = (np.array(column) for column in zip(*pairs))
    return Findings(rows, rank_correlation(targets, w, beaten), len(pairs), _meta(panel, sample, settings))


def merges(run: Run, anchors: int) -> dict[str, MergeSettings]:
    """Return the merges of the targets: equal weights of the K nearest anchors, and last the run's own merge."""
    uniform = {"policy": "uniform", "retrieve": "cosine", "scale": 1.0}
    numbers = [*(k for k in KS if k < anchors), anchors]
    found = {f"uniform, K = {k}": run.merge.model_copy(update=uniform | {"k": k}) for k in numbers}
    own = f"{run.merge.policy}, K = {run.merge.k or anchors}"
    return {name: settings for name, settings in found.items() if name != own} | {own: run.merge}


def _meta(panel: Panel, sample: AttackSample, settings: Privacy) -> dict[str, Any]:
    base, run = panel.base, panel.run
    return {
        "base": base.name,
        "note": base.note,
        "dtype": str(base.dtype).removeprefix("torch."),
        "task": panel.task.name,
        "loss": "NLL of the true answer, " + ("among the labels" if panel.task.labelled else "per token"),
        "anchors": len(sample.anchors),
        "pool": len(sample.pool),
        "targets": len(sample.targets),
        "others": len(sample.others),
        "items": {
            "anchors": sum(len(person.items) for person in sample.anchors),
            "pool": sum(len(person.items) for person in sample.pool),
            "others": sum(len(person.items) for person in sample.others),
        },
        "seed": run.seed,
        "privacy": settings.model_dump(mode="json"),
        "run": run.model_dump(mode="json"),
        "versions": versions(),
    }
