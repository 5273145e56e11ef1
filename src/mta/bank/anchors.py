"""Stage 1: choose the people who become anchors, and train a meta-LoRA on each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from mta.bank.context import BuildContext
from mta.bank.worker import LoraPiece
from mta.config import BankSettings
from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.errors import InputError
from mta.lora.batch import LoraBatch, concatenate
from mta.model.encoders import Encoder, encode_people
from mta.system.atomic import json_sha256
from mta.system.progress import OnStep, Step
from mta.training.plan import Plan
from mta.training.trainer import Job

SHARE = 4  # candidates per anchor, at least
CHOICE = ("anchors", "min_items", "encode", "choose")  # settings of the bank that determine the anchors


def choose_anchors(
    task: Task,
    encoder: Encoder,
    candidates: Sequence[Person],
    settings: BankSettings,
    seed: int,
    on_step: OnStep | None = None,
) -> tuple[list[Person], Tensor, list[int]]:
    """Return the candidates with enough items, their vectors (U, E), and the indices of the anchors among them."""
    eligible = [person for person in candidates if len(person.items) >= settings.min_items]
    if len(eligible) < SHARE:
        raise InputError(
            f"{len(eligible)} of {len(candidates)} candidates for anchors have {settings.min_items} items or more; "
            f"at least {SHARE} such people are needed, and {SHARE * settings.anchors} for {settings.anchors} anchors",
            hint="Give more people, or people with more items, or lower  bank.min_items=…",
        )
    vectors = encode_people(encoder, task, eligible, settings.encode, on_step)
    return eligible, vectors, select_anchors(eligible, vectors, settings.anchors, seed, choose=settings.choose)


def select_anchors(
    candidates: Sequence[Person],
    vectors: Tensor,
    anchors: int,
    seed: int,
    *,
    choose: Literal["active", "central", "random"] = "active",
) -> list[int]:
    """Return the indices of the anchors among the candidates, ascending.

    Clusters ``vectors`` (U, E) by k-means, and takes from each cluster the person with the most items (``active``),
    nearest to the center (``central``), or drawn by the seed (``random``); on ties, the smaller id.
    There is at most one anchor per ``SHARE`` candidates.
    Source: arXiv:2511.20072, stage 1 (``active``); a quarter is our choice.
    """
    clusters = min(anchors, len(candidates) // SHARE)

    def order(i: int, distance: float) -> tuple[float, str]:
        draw = hashlib.sha256(f"{seed}/{candidates[i].id}".encode()).digest()
        orders = {"active": -len(candidates[i].items), "central": distance, "random": int.from_bytes(draw[:6], "big")}
        return orders[choose], candidates[i].id

    return one_per_cluster(vectors, clusters, seed, order)


def one_per_cluster(
    vectors: Tensor, clusters: int, seed: int, order: Callable[[int, float], tuple[float, str | int]]
) -> list[int]:
    """Return, of each cluster, the row of ``vectors`` (U, E) that ``order(row, distance to the center)`` puts first."""
    from sklearn.cluster import KMeans

    means = KMeans(clusters, n_init=4, random_state=seed)
    labels = torch.from_numpy(means.fit_predict(vectors.double().numpy()))
    distances = (vectors.double() - torch.from_numpy(means.cluster_centers_)[labels]).norm(dim=1).tolist()
    rows = ([i for i, label in enumerate(labels.tolist()) if label == cluster] for cluster in range(clusters))
    return sorted(min(some, key=lambda i: order(i, distances[i])) for some in rows if some)


def train_anchors(context: BuildContext, jobs: Sequence[Job], plan: Plan, task_lora: LoraBatch | None) -> LoraBatch:
    """Return the meta-LoRAs, one for each job. Trained cohorts are saved, so that a resumed build does not repeat them.

    Source: arXiv:2511.20072, stage 1. Raises BankError.
    """
    pieces = [
        LoraPiece(f"anchors-{number:03}", "anchors", tuple(jobs[n] for n in cohort), plan.tokens_per_batch)
        for number, cohort in enumerate(plan.cohorts)
    ]
    # Not by the whole plan: threads and the size of passes only affect rounding, and a build may move to a machine with
    # others.
    members = json_sha256(plan.cohorts)
    results = {piece.name: context.result(members, piece.name) for piece in pieces}
    found = {name: saved[0] for name, result in results.items() if (saved := result.load())}
    done = sum(len(piece) for piece in pieces if piece.name in found)
    missing = [piece for piece in pieces if piece.name not in found]
    for piece, trained in context.train(missing, plan.digest, task_lora):
        found[piece.name] = trained.tensors()
        results[piece.name].save(found[piece.name], {})
        context.checkpoint(plan.digest, piece.name).remove()
        done += len(piece)
        if not context.executor.in_process:
            context.record.step("anchors", Step(len(found), len(piece), done, len(jobs)))
    scale = context.run.bank.lora.scale
    loras = [LoraBatch.of_tensors(found[piece.name], scale) for piece in pieces]
    return concatenate(loras).in_order(context.base.targets)
