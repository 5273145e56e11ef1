"""Facts of an experiment beside its scores: how useful a bank is to people outside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from mta.bank.bank import Bank
from mta.config import MergeSettings
from mta.evaluation.protocol import TestBatch
from mta.lora.batch import LoraBatch, join
from mta.lora.merge import truncate
from mta.personalize.merge import Merge, merge_loras
from mta_lab.methods.averaged import merge_factor

PAPER_MERGE = MergeSettings(policy="similarity", k=2)


def bank_facts(bank: Bank) -> dict[str, Any]:
    """Return a bank's hash, what it costs (its anchors, the seconds of each stage, its bytes), and its calibration."""
    kept = sum(file.stat().st_size for file in bank.folder.rglob("*") if file.is_file())
    card = bank.info.calibration.model_dump(mode="json") if bank.info.calibration else None
    return {"bank": bank.hash, "anchors": len(bank), "seconds": bank.info.seconds, "bytes": kept, "calibration": card}


def use_to_others(batches: Sequence[TestBatch], seed: int) -> dict[str, Any]:
    """Return what the bank does for people outside the bank, and what cheaper merges lose.

    ``others``: NLL of the shots minus that of the task LoRA, in nats per target token, for the mean anchor and for the
    best anchor in hindsight. ``fidelity``: relative errors of two merges (of at most two nearest anchors, and the
    run's own) when they are computed by svd at the bank's rank, or by averaging A and B separately.
    """
    evidence = [batch.evidence for batch in batches]
    loss = torch.cat(
        [(one.pooled_loglik[:, None] - one.anchor_loglik) / one.tokens[:, None] for one in evidence]
    )  # (U, N)
    own, nearest = batches[0].run.merge, PAPER_MERGE.model_copy(update={"k": min(2, len(batches[0].bank))})
    return {
        "others": {"mean": float(loss.mean()), "best": float(loss.min(1).values.mean())},
        "fidelity": {
            name: fidelity(batches[0].bank, batches[0].merge(settings, seed)[0])
            for name, settings in (("two nearest", nearest), (own.policy, own))
        },
    }


def fidelity(bank: Bank, merge: Merge) -> dict[str, float]:
    """Return the mean relative error of two cheap merges: svd at the bank's rank, and averaged factors.

    One person at a time: exact merges of 16 people and 50 anchors would take gigabytes.
    """
    errors: dict[str, list[float]] = {"svd": [], "factor": []}
    for u in range(len(merge.ids)):
        one = Merge(merge.ids[u : u + 1], merge.w[u : u + 1].float())
        exact = merge_loras(bank.anchors, one)
        cheap = {"svd": truncate(exact, bank.anchors.rank)[0], "factor": merge_factor(bank.anchors, one.ids, one.w)}
        for name, merged in cheap.items():
            errors[name].append(float(relative_error(merged, exact)))
    return {name: fmean(values) for name, values in errors.items()}


def relative_error(cheap: LoraBatch, exact: LoraBatch) -> Tensor:
    """Return the Frobenius norm of the difference over that of ``exact``, all layers together: (U,); 0 if both are."""
    difference, whole = join([exact, replace(cheap, scale=-cheap.scale)]), _squares(exact)
    return (_squares(difference).clamp_min(0) / whole.clamp_min(torch.finfo(whole.dtype).tiny)).sqrt()


def _squares(batch: LoraBatch) -> Tensor:
    """Return the squared Frobenius norm of each update, (U,). No O x D matrix is formed."""
    factors = batch.scaled_into_b().map(Tensor.double).factors.values()
    return torch.stack([((b.mT @ b) * (a @ a.mT)).sum((1, 2)) for a, b in factors]).sum(0)
