"""Membership inference on a bank: measure how well the loss separates training items from other items.

PriME (arXiv:2503.18008) tests merged models by attacks of this kind. The protocol here is our choice;
docs/explanation/privacy.md lists what it does not cover.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from mta.bank.bank import Bank
from mta.config import MergeSettings, Run
from mta.data.history import Person
from mta.errors import InputError
from mta.evaluation.context import Context
from mta.evaluation.methods import Base, Merged, MergeThenAdapt, Method, TaskLora
from mta.evaluation.methods.merged import answered
from mta.evaluation.metrics import query_nll
from mta.evaluation.protocol import Outcome, TestBatch
from mta.model.base import BaseModel
from mta.model.encoders import Encoder
from mta.personalize.merge import Merge, check_merge
from mta.system.device import dtype_name
from mta.system.progress import OnStep
from mta.system.provenance import versions
from mta_lab.privacy.membership import Attack, Trials, attack
from mta_lab.privacy.sampling import AttackSample, NumberedItems, Sets, flat, sample_people
from mta_lab.privacy.settings import AttackSettings

ANCHORS, POOL, SHOTS = "the anchors' items", "the task LoRA's items", "a person's own shots"
OWN, ANOTHER, PERSONAL = "the anchor's own", "another anchor's", "merge and stack"
Losses = Mapping[int, float]  # number of an item -> its loss under one model
KS = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class AttackRow:
    """One kind of attacked model, asked about one kind of items: numbers of models and items, and each attack by name.

    Attacks are ``loss``, and ``over base`` and ``over task LoRA``: the loss minus that of the reference model.
    """

    about: str
    model: str
    models: int
    members: int
    others: int
    attacks: Mapping[str, Attack]


@dataclass(frozen=True, slots=True)
class Findings:
    """All rows, and how they were made."""

    rows: list[AttackRow]
    meta: dict[str, Any]

    def outcome(self) -> dict[str, Any]:
        """Return the AUC of the strongest attack on each kind of model."""
        best = {f"{row.about}: {row.model}": max(a.auc.mean for a in row.attacks.values()) for row in self.rows}
        return {"AUC": {name: round(auc, 4) for name, auc in best.items()}}


def privacy(
    base: BaseModel,
    bank: Bank,
    people: Sequence[Person],
    settings: AttackSettings,
    *,
    run: Run | None = None,
    encoder: Encoder | None = None,
    on_step: OnStep | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Findings:
    """Attack a bank, its merges and personal models. ``people`` are the bank's own and others, with whole histories.

    ``run`` defaults to the bank's settings.
    The score of an item is minus its loss. The loss is the NLL of the true answer: among the labels if the task has
    labels, else per token.
    Raises InputError if people are missing or prompts show earlier items, ConfigError or AnchorNotFound for a wrong
    merge.
    """
    if bank.history:
        hint = "Attack a bank that was built with task_lora.history=0."
        raise InputError("attacks show no earlier items, and this bank's prompts do", hint=hint)
    run = bank.with_calibrated_settings(run)
    check_merge(run.merge, len(bank), bank.task.labelled, bank.calibration is not None)
    sample = sample_people(bank, people, settings, run.seed)
    asked = (*sample.anchors, *sample.pool, *sample.targets, *sample.others)
    base.prompts.check(bank.task, ((f"an item of {one.id!r}", item) for one in asked for item in one.items))
    shots = [person.first(settings.shots) for person in sample.targets]
    context = Context(base, bank, bank.encoder(base, run.encoder, encoder), run, on_step=on_step)
    batch = TestBatch(context, shots, [()] * len(shots), bank.task, write_texts=False)
    items = NumberedItems.of(sample, settings.shots)
    evaluator = MembershipEvaluator(batch, items, sample.trained, settings.items, say)
    evaluator.attack_references()
    evaluator.attack_meta_loras()
    for name, merge in merges(run, len(bank)).items():
        evaluator.attack_targets(name, Merged(merge=merge), merge)
    if run.stack.enabled:
        evaluator.attack_targets(PERSONAL, MergeThenAdapt(merge=run.merge, stack=run.stack), run.merge)
    rows = sorted(evaluator.rows, key=lambda row: (ANCHORS, POOL, SHOTS).index(row.about))
    return Findings(rows, _meta(batch, sample, settings))


def merges(run: Run, anchors: int) -> dict[str, MergeSettings]:
    """Return the merges of the targets: equal weights of the K nearest anchors, and last the run's own merge."""
    uniform = {"policy": "uniform", "scale": 1.0, "options": {}}
    numbers = [*(k for k in KS if k < anchors), anchors]
    by_name = {f"uniform, K = {k}": run.merge.model_copy(update=uniform | {"k": k}) for k in numbers}
    own = f"{run.merge.policy}, K = {run.merge.k or anchors}"
    return {name: settings for name, settings in by_name.items() if name != own} | {own: run.merge}


def _meta(batch: TestBatch, sample: AttackSample, settings: AttackSettings) -> dict[str, Any]:
    base, run = batch.base, batch.run
    people = {"anchors": sample.anchors, "pool": sample.pool, "others": sample.others}
    return {
        "base": base.name,
        "note": base.note,
        "dtype": dtype_name(base.dtype),
        "task": batch.task.name,
        "loss": "NLL of the true answer, " + ("among the labels" if batch.task.labelled else "per token"),
        **{kind: len(theirs) for kind, theirs in people.items()},
        "targets": len(sample.targets),
        "items": {kind: sum(len(person.items) for person in theirs) for kind, theirs in people.items()},
        "task LoRA": batch.bank.task_lora is not None,
        "anchors pooled": batch.bank.info.run.task_lora.kept_back is not None,
        "seed": run.seed,
        "privacy": settings.model_dump(mode="json"),
        "run": run.model_dump(mode="json"),
        "versions": versions(),
    }


@dataclass(slots=True)
class MembershipEvaluator:
    """Membership inference on one bank: each method asks models about items, and adds rows.

    ``batch`` holds the targets with their shots, ``trained`` the anchors. ``references`` are the losses under the
    models without the attacked LoRA: base and task LoRA, once these are attacked.
    """

    batch: TestBatch
    items: NumberedItems
    trained: Sequence[Person]
    items_each: int
    say: Callable[[str], None] = lambda _: None
    references: dict[str, Losses] = field(default_factory=dict)
    rows: list[AttackRow] = field(default_factory=list)

    def attack_references(self) -> None:
        """Attack the base, which was not trained on the items of anchors, and the task LoRA, which may have been."""
        items = self.items
        # One person asks about all items, so that equal prompts and prompt beginnings are computed once.
        batch, everything = replace(self.batch, people=self.batch.people[:1]), [range(len(items.items))]
        for method in [Base(), TaskLora()] if self.batch.bank.task_lora else [Base()]:
            self.say(method.name)
            losses = self._losses(batch, everything, partial(method.run, seed=0))[0]
            add, same = partial(self._add_row, model=method.name), [losses] * len(items.shots)
            add(ANCHORS, losses=[losses], members=[flat(items.anchors)], others=[items.others])
            add(POOL, losses=[losses], members=[flat(items.pool)], others=[items.others])
            add(SHOTS, losses=same, members=items.shots, others=items.later, owners=items.targets)
            self.references[method.name] = losses

    def attack_meta_loras(self) -> None:
        """Attack each meta-LoRA alone, w = 1: about its own anchor, the upper bound, and about another."""
        self.say("meta-LoRAs, one by one")
        anchors = self.items.anchors
        count, others = len(anchors), self.items.others_of(len(anchors))
        w = torch.ones(count, 1, dtype=self.batch.base.master_dtype)
        alone = partial(answered, merge=Merge(torch.arange(count)[:, None], w), seconds=0.0)
        following = [*anchors[1:], anchors[0]] if count > 1 else [[]]
        losses = self._losses(replace(self.batch, people=self.trained), _joined(anchors, following, others), alone)
        for model, members in ((OWN, anchors), (ANOTHER, following)):
            self._add_row(ANCHORS, model=model, losses=losses, members=members, others=others, owners=range(count))

    def attack_targets(self, model: str, method: Method, settings: MergeSettings) -> None:
        """Attack the targets' models about the anchors in their merges, by ``settings``, and about shots.

        Rows about shots exist for the run's own merge only.
        """
        self.say(model)
        items, run = self.items, self.batch.run
        merge, _ = self.batch.merge(settings, run.seed)
        gates = merge.gates(len(items.anchors)).double().abs()
        others, members = items.others_of(len(items.shots)), items.merged_items(gates, self.items_each)
        with_shots = settings == run.merge
        asked = _joined(members, others, items.shots, items.later) if with_shots else _joined(members, others)
        losses = self._losses(self.batch, asked, partial(method.run, seed=run.seed))
        add = partial(self._add_row, model=model, losses=losses, owners=items.targets)
        add(ANCHORS, members=members, others=others)
        if with_shots:
            add(SHOTS, members=items.shots, others=items.later)

    def _losses(self, batch: TestBatch, asked: Sets, run: Callable[[TestBatch], Outcome]) -> list[Losses]:
        queries = [tuple(self.items.items[n] for n in numbers) for numbers in asked]
        batch = replace(batch, queries=queries, merges_from=batch)
        losses: list[Losses] = []
        for numbers, answers, golds in zip(asked, run(batch).answers, batch.golds):
            nll = query_nll(batch.task, answers, golds)
            assert nll is not None  # every attacked model gives probabilities
            losses.append(dict(zip(numbers, nll.tolist())))
        return losses

    def _add_row(
        self,
        about: str,
        *,
        model: str,
        losses: Sequence[Losses],
        members: Sets,
        others: Sets,
        owners: Sequence[int] = (),
    ) -> None:
        """Add one row, or none without members or others.

        ``owners`` numbers the person of each model: their items are resampled together with the model.
        """
        counts = len(flat(members)), len(flat(others))
        if not all(counts):
            return
        entries = [(m, n, kind) for kind, sets in ((1, members), (0, others)) for m, ns in enumerate(sets) for n in ns]
        number, item, member = np.array(entries, dtype=np.intp).T
        person = np.array(self.items.owners, dtype=np.intp)[item]
        if owners:
            person[person == np.array(owners)[number]] = -1
        loss = np.array([losses[m][n] for m, n, _ in entries])
        scores = {"loss": -loss}
        for reference, known in self.references.items():
            scores[f"over {reference}"] = np.array([known[n] for _, n, _ in entries]) - loss
        trials = Trials(number, person, member == 1)
        attacks = {name: attack(trials, values) for name, values in scores.items()}
        self.rows.append(AttackRow(about, model, len(losses), *counts, attacks))


def _joined(*parts: Sets) -> Sets:
    return [flat(sets) for sets in zip(*parts)]
