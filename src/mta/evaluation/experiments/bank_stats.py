"""Facts of an experiment beside its scores: the usefulness of a bank, and the case of one person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mta.bank.bank import Bank
from mta.config import MergeSettings
from mta.evaluation.methods import Base, Merged, MergeThenAdapt, OneLora, TaskLora
from mta.evaluation.metrics import query_nll
from mta.evaluation.protocol import Panel
from mta.lora.batch import LoraBatch
from mta.personalize.merge import Merge, merged_factors

PAPER = MergeSettings(policy="similarity", k=2)


def bank_facts(panels: Sequence[Panel], bank: Bank, seed: int) -> dict[str, Any]:
    """Return what the bank does for people outside the bank, and what cheaper merges lose.

    ``others``: NLL of the shots minus that of the task LoRA, in nats per target token, for a random anchor and for the
    best anchor in hindsight. ``fidelity``: relative errors of two merges (the two nearest anchors, and the run's own)
    when they are computed by svd at the bank's rank, or by averaging A and B separately.
    """
    losses = []
    for panel in panels:
        evidence = panel.evidence
        losses.append((evidence.task[:, None] - evidence.anchors) / evidence.tokens[:, None])
    loss = torch.cat(losses)  # (U, N)
    vectors = bank.vectors - bank.vectors.mean(0)
    return {
        "anchors": len(bank),
        "others": {"mean": float(loss.mean()), "best": float(loss.min(1).values.mean())},
        "alike": float(torch.nn.functional.normalize(vectors, dim=1).double().matmul(vectors.double().T).mean()),
        "norms": [round(norm, 5) for norm in _norms(bank.anchors).tolist()],
        "seconds": bank.info.seconds,
        "bytes": sum(file.stat().st_size for file in bank.folder.rglob("*") if file.is_file()),
        "fidelity": {
            name: fidelity(bank, panels[0].merge(settings, seed)[0])
            for name, settings in (("two nearest", PAPER), (panels[0].run.merge.policy, panels[0].run.merge))
        },
    }


def fidelity(bank: Bank, merge: Merge) -> dict[str, float]:
    """Return the mean relative error of two cheap merges: svd at the bank's rank, and averaged factors."""
    merge = Merge(merge.ids, merge.w.float())
    exact = merged_factors(bank.anchors, merge, MergeSettings())
    cheap = {"svd": MergeSettings(mode="svd"), "factor": MergeSettings(mode="factor")}
    return {
        name: float(relative_error(merged_factors(bank.anchors, merge, settings), exact).mean())
        for name, settings in cheap.items()
    }


def relative_error(cheap: LoraBatch, exact: LoraBatch) -> Tensor:
    """Return the Frobenius norm of the difference over that of ``exact``, all layers together: (U,).

    No O x D matrix is formed.
    """
    error, whole = torch.zeros(len(exact), dtype=torch.float64), torch.zeros(len(exact), dtype=torch.float64)
    for name, (a, b) in exact.factors.items():
        other_a, other_b = cheap.factors[name]
        whole += _square(a, b * exact.scale)
        error += _square(torch.cat([a, other_a], 1), torch.cat([b * exact.scale, -other_b * cheap.scale], 2))
    return (error.clamp_min(0) / whole).sqrt()


def _square(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared Frobenius norm of b @ a: (U,)."""
    a, b = a.double(), b.double()
    return ((b.mT @ b) * (a @ a.mT)).sum((1, 2))


def _norms(batch: LoraBatch) -> Tensor:
    squares = [_square(a, b * batch.scale) for a, b in batch.factors.values()]
    return torch.stack(squares).sum(0).sqrt()


def case_study(panel: Panel, settings: MergeSettings, seed: int) -> dict[str, Any]:
    """Return the last query of one person under base, task LoRA, merge, adapt and MTA, and the reasons for the merge.

    The person is the panel's first, so that no result is picked. The case contains this person's texts.
    """
    task, person = panel.task, panel.people[0]
    merge, _ = panel.merge(settings, seed)
    evidence, bank = panel.evidence, panel.bank
    query = panel.queries[0][-1]
    stack = panel.run.stack
    adapt = OneLora(name="adapt only", lora=stack.lora, training=stack.training)
    answers = {}
    for method in [Base(), TaskLora(), Merged(merge=settings), adapt, MergeThenAdapt()]:
        found = method.run(panel, seed).answers[0]
        nll = query_nll(task, found, panel.golds[0])
        scores = None if found.scores is None else found.scores[-1].double().softmax(0).tolist()
        answers[method.name] = {
            "text": found.texts[-1],
            "nll": None if nll is None else float(nll[-1]),
            "labels": scores and dict(zip(task.labels or (), scores)),
        }
    gain = evidence.anchors[0] - evidence.task[0]
    why = [
        {
            "anchor": int(anchor),
            "items": bank.info.items[int(anchor)],
            "cosine": float(panel.similarity[0, int(anchor)]),
            "gain": float(gain[int(anchor)]),
            "w": float(w),
        }
        for anchor, w in zip(merge.ids[0], merge.w[0])
    ]
    return {
        "shots": [task.sentence(item) for item in person.items],
        "query": task.prompt(query),
        "gold": task.target(query),
        "anchors": sorted(why, key=lambda anchor: -abs(float(anchor["w"]))),
        "answers": answers,
    }
