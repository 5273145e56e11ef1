"""Membership inference on a bank: whether items it was trained on are told apart from others' by their loss.

PriME (arXiv:2503.18008) tests merged models by attacks of this kind; the protocol here is our choice,
docs/explanation/privacy.md says what it leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mta.bank.bank import Bank
from mta.config import MergeSettings, Privacy, Run
from mta.data.history import Person
from mta.evaluation.privacy.evaluator import ANCHORS, POOL, SHOTS, Exam, Row
from mta.evaluation.privacy.membership import rank_correlation
from mta.evaluation.privacy.sampling import Cast, cast
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
    """All rows, and how far an anchor's coefficient goes with being found: Spearman's correlation over ``pairs``."""

    rows: list[Row]
    weights: Interval | None
    pairs: int
    meta: dict[str, Any]

    def outcome(self) -> dict[str, Any]:
        """A few numbers: the AUC of the strongest attack on every kind of model."""
        best = {f"{row.about}: {row.name}": max(one.auc.mean for one in row.attacks.values()) for row in self.rows}
        return {"AUC": {name: round(auc, 4) for name, auc in best.items()}}

    def row(self, about: str, name: str) -> Row:
        """A row by whose items it is about and its name."""
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
    """Attack a bank, merges of it and personal models; ``people`` are the bank's own and others, with whole histories.

    The score of an item is minus its loss, the NLL of the true answer: among the labels where there are labels, else
    per token. Raises InputError where people are missing, ConfigError and AnchorNotFound for a merge that cannot be.
    """
    check_merge(run.merge, len(bank), bank.task.labelled)
    parts = cast(bank, people, settings, run.seed)
    shots = [person.first(settings.shots) for person in parts.targets]
    encoder = encoder or bank.encoder(base, run.encoder)
    panel = Panel(base, bank, encoder, run, shots, [()] * len(shots), on_step, texts=False)
    exam = Exam(panel, parts, settings.items, say)
    exam.references()
    exam.meta_loras()
    for name, merge in merges(run, len(bank)).items():
        exam.merge(name, merge)
    if run.stack.enabled:
        exam.personal()
    rows = sorted(exam.rows, key=lambda row: (ANCHORS, POOL, SHOTS).index(row.about))
    target, w, found = (np.array(column) for column in zip(*exam.pairs))
    return Findings(rows, rank_correlation(target, w, found), len(exam.pairs), _meta(panel, parts, settings))


def merges(run: Run, anchors: int) -> dict[str, MergeSettings]:
    """What targets are merged by: K of the nearest weighed alike, and last the run's own."""
    alike = {"policy": "uniform", "retrieve": "cosine", "scale": 1.0}
    numbers = [*(k for k in KS if k < anchors), anchors]
    made = {f"uniform, K = {k}": run.merge.model_copy(update=alike | {"k": k}) for k in numbers}
    own = f"{run.merge.policy}, K = {run.merge.k or anchors}"
    return {name: one for name, one in made.items() if name != own} | {own: run.merge}


def _meta(panel: Panel, parts: Cast, settings: Privacy) -> dict[str, Any]:
    base, run = panel.base, panel.run
    return {
        "base": base.name,
        "note": base.note,
        "dtype": str(base.dtype).removeprefix("torch."),
        "task": panel.task.name,
        "loss": "NLL of the true answer, " + ("among the labels" if panel.task.labelled else "per token"),
        "anchors": len(parts.anchors),
        "pool": len(parts.pool),
        "targets": len(parts.targets),
        "others": len(parts.others),
        "items": {
            "anchors": sum(len(person.items) for person in parts.anchors),
            "pool": sum(len(person.items) for person in parts.pool),
            "others": sum(len(person.items) for person in parts.others),
        },
        "seed": run.seed,
        "privacy": settings.model_dump(mode="json"),
        "run": run.model_dump(mode="json"),
        "versions": versions(),
    }
