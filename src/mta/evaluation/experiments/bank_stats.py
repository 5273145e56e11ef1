"""What an experiment tells beside scores: what a bank is good for, and one person's case from question to answer."""

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
    """What the bank does for people who are not in it, and what cheaper merges lose.

    Nats per target token: of an anchor taken at random, and of the best one in hindsight, against the task LoRA on the
    shots. ``fidelity``: relative error of a merge of the two nearest, and of the run's own merge, cut by svd to the
    bank's rank, or with factors averaged apart.
    """
    gains = []
    for panel in panels:
        evidence = panel.evidence
        gains.append((evidence.task[:, None] - evidence.anchors) / evidence.tokens[:, None])
    loss = torch.cat(gains)  # (U, N)
    vectors = bank.vectors - bank.vectors.mean(0)
    return {
        "anchors": len(bank),
        "others": {"mean": float(loss.mean()), "best": float(loss.min(1).values.mean())},
        "alike": float(torch.nn.functional.normalize(vectors, dim=1).double().matmul(vectors.double().T).mean()),
        "norms": [round(float(one), 5) for one in _norms(bank.anchors)],
        "seconds": bank.info.seconds,
        "bytes": sum(file.stat().st_size for file in bank.folder.rglob("*") if file.is_file()),
        "fidelity": {
            name: fidelity(bank, panels[0].merge(settings, seed)[0])
            for name, settings in (("two nearest", PAPER), (panels[0].run.merge.policy, panels[0].run.merge))
        },
    }


def fidelity(bank: Bank, merge: Merge) -> dict[str, float]:
    """Mean relative error of a merge by svd to the bank's rank, and by averaged factors, against the exact one."""
    merge = Merge(merge.ids, merge.w.float())
    exact = merged_factors(bank.anchors, merge, MergeSettings())
    cheap = {"svd": MergeSettings(mode="svd"), "factor": MergeSettings(mode="factor")}
    return {
        name: float(relative_error(merged_factors(bank.anchors, merge, settings), exact).mean())
        for name, settings in cheap.items()
    }


def relative_error(one: LoraBatch, exact: LoraBatch) -> Tensor:
    """Frobenius norm of the difference over that of ``exact``, all layers together: (U,). No O x D matrix is formed."""
    lost, whole = torch.zeros(len(exact), dtype=torch.float64), torch.zeros(len(exact), dtype=torch.float64)
    for name, (a, b) in exact.factors.items():
        other_a, other_b = one.factors[name]
        whole += _square(a, b * exact.scale)
        lost += _square(torch.cat([a, other_a], 1), torch.cat([b * exact.scale, -other_b * one.scale], 2))
    return (lost.clamp_min(0) / whole).sqrt()


def _square(a: Tensor, b: Tensor) -> Tensor:
    """Squared Frobenius norm of b @ a: (U,)."""
    a, b = a.double(), b.double()
    return ((b.mT @ b) * (a @ a.mT)).sum((1, 2))


def _norms(batch: LoraBatch) -> Tensor:
    squares = [_square(a, b * batch.scale) for a, b in batch.factors.values()]
    return torch.stack(squares).sum(0).sqrt()


def case_study(panel: Panel, settings: MergeSettings, seed: int) -> dict[str, Any]:
    """One person's last query under base, task LoRA, merge, adapt and MTA, and why their merge is what it is.

    The panel's first person: nobody has looked at how well it went. Holds this person's texts.
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
        "shots": [task.told(item) for item in person.items],
        "query": task.prompt(query),
        "gold": task.target(query),
        "anchors": sorted(why, key=lambda one: -abs(float(one["w"]))),
        "answers": answers,
    }
