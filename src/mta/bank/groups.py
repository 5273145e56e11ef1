"""Stage 1 with groups: an anchor is a group of people who need similar coefficients, trained on all their items.

One round is one step of expectation and maximization for a mixture of people:

    expectation   the gradient of everybody's items in the coefficients of the bank so far, in one pass, and from it
                  their coefficients, as the policy ``laplace`` computes them
    assignment    k-means of these in the metric of the curvature, in which a distance is a difference in likelihood
    maximization  one LoRA per group on items of its members, all from the same A

The first bank are single people. Rounds repeat while people outside the groups gain.
Source: our choice; docs/decisions/031-groups.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mta.bank.anchors import Roles, train_anchors
from mta.bank.calibration.calibrate import Measure, calibrator_of, measuring, size_of_passes
from mta.bank.calibration.crossfit import MULTIPLES, RIDGE, TURNS
from mta.bank.calibration.laplace import prior_of, regular, solved
from mta.bank.calibration.people import Subject, subjects_of
from mta.bank.calibration.probes import COSTS, CalibrationWorker, Probe
from mta.bank.context import BuildContext
from mta.bank.task_lora import spread
from mta.config import Run
from mta.data.earlier import as_shown
from mta.data.history import Item, Person
from mta.data.tasks.prompt import Example
from mta.lora.batch import LoraBatch
from mta.system.atomic import json_sha256
from mta.system.progress import Step
from mta.training.gates import summed, units_of
from mta.training.plan import Plan
from mta.training.trainer import Job

_PASSES = 10  # of k-means with a minimum size, after k-means without one
SEEN = 24  # items of a person that the expectation reads, at most
_TRUSTED = 1e3  # shots: the strongest prior of an expectation, which only ranks people


class Groups(NamedTuple):
    """The LoRAs of a bank, the people and the number of items behind each, and how many texts were ``shortened``.

    ``tried`` are numbers of groups that were trained, round by round, each with the gain of people outside per token.
    """

    loras: LoraBatch
    people: list[list[Person]]
    items: list[int]
    shortened: int = 0
    tried: tuple[tuple[int, float], ...] = ()

    @property
    def digest(self) -> str:
        """Digest of who is behind each LoRA: results that were measured over other LoRAs are not taken."""
        return _digest(self.people)


def _digest(groups: Sequence[Sequence[Person]]) -> str:
    return json_sha256([[person.id for person in group] for group in groups])


def train_groups(
    context: BuildContext, roles: Roles, jobs: Sequence[Job], plan: Plan, task_lora: LoraBatch | None
) -> Groups:
    """Return the LoRAs of groups of ``roles.behind_anchors``; ``jobs`` and ``plan`` are those of the first bank.

    Raises BankError, MemoryBudgetError.
    """
    settings, tried, gained = context.run.bank, list[tuple[int, float]](), float("-inf")
    brief = settings.model_copy(update={"training": settings.first_training})
    run = context.run.model_copy(update={"bank": brief})
    first = train_anchors(replace(context, run=run), jobs, plan, task_lora)
    best = Groups(first, [[one] for one in roles.anchors], [])
    for number in range(1, settings.rounds + 1):
        known = _expectation(context, roles.behind_anchors, best, task_lora, number)
        counts = (settings.sizes or (settings.anchors,)) if number == 1 else (len(best.people),)
        made = [_maximization(context, roles.behind_anchors, *known, count, task_lora, number) for count in counts]
        if settings.rounds == len(counts) == 1:  # nothing to choose
            return made[0]
        gains = [_gain_outside(context, roles, one, task_lora, f"{number}-{n}") for n, one in enumerate(made)]
        tried += [(len(one.people), round(gain, 5)) for one, gain in zip(made, gains)]
        winner = max(range(len(made)), key=gains.__getitem__)
        if gains[winner] <= gained:
            break
        best, gained = made[winner], gains[winner]
    return best._replace(tried=tuple(tried))


def _halves(context: BuildContext, people: Sequence[Person]) -> list[tuple[list[Example], list[Example]]]:
    """Return every other item of each person as examples, and the rest: of the latest ones, at most ``SEEN``."""
    task, history = context.task, context.run.task_lora.history
    most = min(SEEN, context.run.bank.max_items)  # items before these are not checked
    items = [as_shown(task, [person], person.items[-most:], history).items for person in people]
    examples = chain(*context.base.prompts.all(task, chain(*items)))
    every = [list(islice(examples, len(own))) for own in items]
    return [(own[::2], own[1::2]) for own in every]


def _expectation(
    context: BuildContext, people: Sequence[Person], known: Groups, task_lora: LoraBatch | None, number: int
) -> tuple[Tensor, Tensor]:
    """Return everybody's coefficients (U, N), and the metric (N, N) of their differences."""
    halves = _halves(context, people)
    units, places = units_of([half for both in halves for half in both], [0] * (2 * len(halves)))
    parts = [part for _, part in units]
    subjects = [Subject(tuple(one), tuple(other)) for one, other in halves]
    measure, together = _measure(context, subjects, known, task_lora, "")
    nothing, cuts = torch.zeros(len(parts), len(known.loras)).double(), range(0, len(parts), together)
    pieces = [
        Probe(f"groups-{number}-{n}", "sums", tuple(parts[n : n + together]), nothing[n : n + together]) for n in cuts
    ]
    results, done, every = dict[str, Tensor](), 0, COSTS["sums"] * sum(map(len, parts))
    context.record.stage_begins()
    for piece, result in measure(pieces):
        results[piece.name] = result
        done += piece.cost
        context.record.step("groups", Step(len(results), len(piece), done, every))
    found = torch.cat([results[piece.name] for piece in pieces]).double()
    rows = summed(found, places).view(len(halves), 2, -1)
    rows = rows.masked_fill(
        ~rows.isfinite().all(dim=2).all(dim=1)[:, None, None], 0.0
    )  # no gradient of these people counts
    counts = torch.tensor([[len(one), len(other)] for one, other in halves]).double()
    return coefficients_of(rows[..., :-1], counts)


def coefficients_of(halves: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return coefficients (U, N) near the pooled model from the gradients of both halves of everybody's items.

    Shapes: halves (U, 2, N), each summed over a half's items; counts (U, 2), these items, at least one in each. Also
    returns the metric (N, N), the curvature of one item's log-likelihood: the covariance of gradients within people.
    """
    means = halves / counts[..., None]
    apart = (means[:, 0] - means[:, 1]) / (1 / counts).sum(1, keepdim=True).sqrt()  # as noisy as one item's gradient
    people, _, anchors = halves.shape
    found, share = apart.T @ apart / people, anchors / (anchors + people)
    curvature = (1 - share) * found + share * torch.diag(found.diagonal())
    prior = prior_of([*means], [0] * people, curvature, RIDGE) * float(counts.mean())
    n = counts.sum(1, keepdim=True)
    steps = solved(curvature, RIDGE, halves.sum(1) / n)
    return n / (n + min(prior, _TRUSTED)) * steps, regular(curvature, RIDGE)


def assigned(w: Tensor, metric: Tensor, count: int, least: int, seed: int) -> list[list[int]]:
    """Return the rows of ``w`` (U, N) in ``count`` groups, or in fewer if some would have less than ``least`` rows.

    K-means in the ``metric`` (N, N) with a minimum size: a group that is too small gets the rows that lose least by it
    (Bradley, Bennett, and Demiriz, 2000). Groups are in the order of rows.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist
    from sklearn.cluster import KMeans

    z = (w @ torch.linalg.cholesky(metric)).numpy()
    count = max(min(count, len(z) // least), 1)
    centers = KMeans(count, n_init=4, random_state=seed).fit(z).cluster_centers_
    for _ in range(_PASSES):
        distances = cdist(z, centers, "sqeuclidean")
        group = distances.argmin(axis=1)
        loss = distances - distances.min(axis=1, keepdims=True)
        rows, places = linear_sum_assignment(loss.repeat(least, axis=1))  # `least` places of each group are filled
        group[rows] = places // least
        centers = np.stack([z[group == n].mean(axis=0) for n in range(count)])
    return sorted([row for row, of in enumerate(group) if of == n] for n in range(count))


def items_of(group: Sequence[Person], run: Run) -> list[Item]:
    """Return the items that a group is trained on: at most ``group_items``, of everybody's latest ``max_items``."""
    settings = run.bank
    latest = [person.latest(settings.max_items) for person in group]
    return spread(latest, settings.max_items, run.seed)[: settings.group_items]


def group_job(context: BuildContext, key: str, group: Sequence[Person]) -> Job:
    """Return the job of a group's LoRA. Raises DataError for an item that does not fit."""
    items = items_of(group, context.run)
    return context.job(key, *as_shown(context.task, group, items, context.run.task_lora.history))


def _maximization(
    context: BuildContext,
    people: Sequence[Person],
    w: Tensor,
    metric: Tensor,
    count: int,
    task_lora: LoraBatch | None,
    number: int,
) -> Groups:
    """Return at most ``count`` groups of people with similar coefficients, each with a LoRA of its own."""
    run, settings = context.run, context.run.bank
    groups = [[people[i] for i in rows] for rows in assigned(w, metric, count, settings.min_people, run.seed)]
    jobs = [group_job(context, f"group-{n}", group) for n, group in enumerate(groups)]
    plan = context.plan(jobs, settings.lora, frozen=run.task_lora.lora if task_lora else None)
    name, who = f"groups-{number}-{len(groups)}", _digest(groups)
    loras = train_anchors(context, jobs, plan, task_lora, name=name, who=who)
    return Groups(loras, groups, [len(job.examples) for job in jobs], plan.shortened)


def _gain_outside(context: BuildContext, roles: Roles, made: Groups, task_lora: LoraBatch | None, name: str) -> float:
    """Return what people who calibrate the bank gain by a merge, per token."""
    subjects = subjects_of(context.base, context.task, roles.calibrating, context.run)
    measure, together = _measure(context, subjects, made, task_lora, f"outside-{name}-")
    scored = COSTS["scores"] * (TURNS * len(MULTIPLES) + 1)
    every = sum(COSTS["gradients"] * len(one.all) + scored * len(one.queries) for one in subjects)

    def on_step(step: Step) -> None:
        context.record.step("gain outside", replace(step, examples_total=every))

    context.record.stage_begins()
    count = len(made.loras)
    return calibrator_of(context.run, context.task, subjects, count, measure, together, on_step).quick_gain()


def _measure(
    context: BuildContext, subjects: Sequence[Subject], made: Groups, task_lora: LoraBatch | None, name: str
) -> tuple[Measure, int]:
    """Return what computes probes of these people over the LoRAs, and how many people a probe holds."""
    base, executor, loras = context.base, context.executor, made.loras
    tokens, together = size_of_passes(base, subjects, len(loras), context.run, executor.most, executor.on_gpu)
    working = loras.to(base.device, base.dtype)
    worker = CalibrationWorker(base, working, task_lora and task_lora.to(base.device), context.run, tokens)
    return measuring(worker, executor, lambda piece: context.result(made.digest, name + piece)), together
