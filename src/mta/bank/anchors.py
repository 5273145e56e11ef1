"""Stage 1: choose the anchors and what everybody else does in a build, and train a meta-LoRA on each anchor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mta.bank.calibration.crossfit import ENOUGH
from mta.bank.calibration.people import by_hash, calibration_people
from mta.bank.context import BuildContext
from mta.bank.members import Members
from mta.bank.task_lora import pooled_candidates
from mta.bank.worker import LoraPiece
from mta.config import BankSettings, Run
from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.errors import ConfigError, InputError
from mta.lora.batch import LoraBatch, concatenate
from mta.model.encoders import Encoder, encode_people
from mta.system.atomic import json_sha256
from mta.system.progress import OnStep, Step
from mta.training.plan import Plan
from mta.training.trainer import Job

SHARE = 4  # candidates per anchor, at least
CHOICE = ("anchors", "min_items", "encode", "choose")  # settings of the bank that determine the anchors


@dataclass(frozen=True, slots=True, eq=False)
class Roles:
    """The people of a bank by what they do. ``chosen`` are the places of the anchors in ``eligible``."""

    task_people: list[Person]  # they train the task LoRA with all their items
    pooled_candidates: list[Person]  # candidates who train it, too, with the items that may
    held_out: list[Person]
    eligible: list[Person]  # candidates with enough items for an anchor
    vectors: Tensor  # of ``eligible``, (U, E)
    chosen: list[int]
    calibrating: list[Person]
    behind_anchors: list[Person]  # candidates who train anchors: the anchors, or with groups all who do not calibrate
    keeping_back: list[Person]  # candidates who keep items back, with these alone

    @property
    def anchors(self) -> list[Person]:
        return [self.eligible[i] for i in self.chosen]

    @property
    def pooled(self) -> list[Person]:
        """The people behind the task LoRA, with the items that may be."""
        return [*self.task_people, *self.pooled_candidates, *self.held_out]

    def members(self, secret: str, behind: Sequence[Sequence[Person]]) -> Members:
        """Return the members of the bank; ``secret`` makes their key, and ``behind`` are the people of each anchor."""
        task, eligible, calibrating = (
            [one.id for one in group] for group in (self.pooled, self.eligible, self.calibrating)
        )
        anchors = [[person.id for person in group] for group in behind]
        return Members.of(secret, task, eligible, anchors, calibrating, self.keeping_back)


def choose_roles(context: BuildContext) -> Roles:
    """Choose the anchors among the candidates, and what everybody else does.

    Raises InputError if there are too few candidates, ConfigError if they keep too few items back or cannot compare
    groups.
    """
    task, run, candidates = context.task, context.run, context.candidates
    grouped = run.bank.choose == "groups"
    outside = _outside(candidates, run) if grouped and run.calibration.enabled else set()
    _check_compared(run, len(outside))  # before people are encoded
    eligible, vectors, chosen = choose_anchors(
        task, context.encoder, candidates, run.bank, run.seed, context.on_step, outside
    )
    behind = [one for one in eligible if one.id not in outside] if grouped else [eligible[i] for i in chosen]
    anchors, kept_back = {person.id for person in behind}, run.task_lora.kept_back
    pool = [*context.task_people] if run.task_lora.enabled else []
    if kept_back is not None:  # candidates with too few items for an anchor train like task people
        pool += [person for person in candidates if len(person.items) < run.bank.min_items]
    others = [person for person in eligible if person.id not in anchors]
    calibrating = _calibrating(task, eligible, [*pool, *context.held_out], anchors, run)
    _check_compared(run, len(calibrating) if grouped else 0)
    return Roles(
        task_people=pool,
        pooled_candidates=pooled_candidates(eligible, anchors, run.task_lora),
        held_out=[*context.held_out],
        eligible=eligible,
        vectors=vectors,
        chosen=chosen,
        calibrating=calibrating,
        behind_anchors=behind,
        keeping_back=[] if kept_back is None else [person.first(kept_back) for person in others],
    )


def _check_compared(run: Run, left: int) -> None:
    """Raise ConfigError if groups are to be compared on fewer than ``ENOUGH`` people who are ``left``."""
    sizes = len(run.bank.sizes) > (1 if run.bank.choose == "groups" else 0)
    if left < ENOUGH and (run.bank.rounds > 1 or sizes):
        raise ConfigError(
            f"bank.sizes and bank.rounds need groups, and {ENOUGH} people who calibrate them; {left} are left",
            hint="Leave them out, or set bank.choose=groups calibration.enabled=true, and give more people.",
        )


def _outside(candidates: Sequence[Person], run: Run) -> set[str]:
    """Return the ids of the people to calibrate on, who are in no group: at most a quarter of the candidates."""
    able = [person for person in candidates if len(person.items) >= run.bank.min_items]
    return {one.id for one in by_hash(able, run.seed)[: min(run.calibration.people, len(able) // SHARE)]}


def _calibrating(
    task: Task, candidates: Sequence[Person], task_people: Sequence[Person], anchors: set[str], run: Run
) -> list[Person]:
    """Return the candidates to calibrate on, who are no ``anchors`` (ids); none if calibration is off."""
    settings, kept_back = run.calibration, run.task_lora.kept_back
    if not settings.enabled:
        return []
    if kept_back is not None and kept_back < (needed := settings.shots + settings.queries):
        raise ConfigError(
            f"candidates keep {kept_back} items back; {settings.shots} shots and {settings.queries} queries are needed",
            hint=f"Set task_lora.unseen={needed}, or lower calibration.shots.",
        )
    unseen = {} if kept_back is None else {person.id: kept_back for person in candidates}
    members = anchors | {person.id for person in task_people}
    return calibration_people([*candidates, *task_people], members, settings, run.seed, task, unseen)


def choose_anchors(
    task: Task,
    encoder: Encoder,
    candidates: Sequence[Person],
    settings: BankSettings,
    seed: int,
    on_step: OnStep | None = None,
    outside: Set[str] = frozenset(),
) -> tuple[list[Person], Tensor, list[int]]:
    """Return the candidates with enough items, their vectors (U, E), and the indices of the anchors among them.

    People ``outside`` (ids) become no anchors.
    """
    eligible = [person for person in candidates if len(person.items) >= settings.min_items]
    able = [i for i, person in enumerate(eligible) if person.id not in outside]
    if len(able) < SHARE:
        raise InputError(
            f"{len(able)} of {len(candidates)} candidates for anchors have {settings.min_items} items or more; "
            f"at least {SHARE} such people are needed, and {SHARE * settings.anchors} for {settings.anchors} anchors",
            hint="Give more people, or people with more items, or lower  bank.min_items=…",
        )
    vectors = encode_people(encoder, task, eligible, settings.encode, on_step)
    choose = "active" if settings.choose == "groups" else settings.choose
    chosen = select_anchors([eligible[i] for i in able], vectors[able], settings.first_bank, seed, choose=choose)
    return eligible, vectors, [able[i] for i in chosen]


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


def train_anchors(
    context: BuildContext,
    jobs: Sequence[Job],
    plan: Plan,
    task_lora: LoraBatch | None,
    name: str = "anchors",
    who: str = "",
) -> LoraBatch:
    """Return the meta-LoRAs, one for each job. Trained cohorts are saved, so that a resumed build does not repeat them.

    The files are called ``name``, and are only taken for the same people (``who``, a hash).
    Source: arXiv:2511.20072, stage 1. Raises BankError.
    """
    pieces = [
        LoraPiece(f"{name}-{number:03}", "anchors", tuple(jobs[n] for n in cohort), plan.tokens_per_batch)
        for number, cohort in enumerate(plan.cohorts)
    ]
    # Not by the whole plan: threads and the size of passes only affect rounding, and a build may move to a machine with
    # others.
    members, digest = json_sha256(plan.cohorts) + who, plan.digest + who
    results = {piece.name: context.result(members, piece.name) for piece in pieces}
    tensors = {name: saved[0] for name, result in results.items() if (saved := result.load())}
    done = sum(len(piece) for piece in pieces if piece.name in tensors)
    missing = [piece for piece in pieces if piece.name not in tensors]
    for piece, trained in context.train(missing, digest, task_lora):
        tensors[piece.name] = trained.tensors()
        results[piece.name].save(tensors[piece.name], {})
        context.checkpoint(digest, piece.name).remove()
        done += len(piece)
        if not context.executor.in_process:
            context.record.step("anchors", Step(len(tensors), len(piece), done, len(jobs)))
    scale = context.run.bank.lora.scale
    loras = [LoraBatch.of_tensors(tensors[piece.name], scale) for piece in pieces]
    return concatenate(loras).in_order(context.base.targets)
