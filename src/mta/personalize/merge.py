"""Stage 2: retrieve anchors for each person and fit the coefficients of their merge, from their shots alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mta.bank.bank import Bank
from mta.config import MergeSettings, Training
from mta.errors import AnchorNotFound, ConfigError
from mta.lora.batch import LoraBatch, stack
from mta.lora.layers import Adapters, Gated, PerPerson, Shared
from mta.lora.merge import merge_exact, merge_factor, merge_svd
from mta.model.base import BaseModel
from mta.model.footprint import Numbers
from mta.personalize.likelihoods import Evidence, gather_evidence
from mta.personalize.policies import POLICIES, Retrieved
from mta.system.progress import OnStep, Step
from mta.training.trainer import Job, train


@dataclass(frozen=True, slots=True)
class Merge:
    """A merge for each of U people: anchor numbers ``ids`` (U, K), coefficients ``w`` (U, K), or (U, L, K) by layer."""

    ids: Tensor
    w: Tensor

    def select(self, people: Sequence[int]) -> Merge:
        """The merges of some of the people."""
        return Merge(self.ids[list(people)], self.w[list(people)])

    def gates(self, anchors: int) -> Tensor:
        """The same coefficients over all anchors, (U, N) or (U, L, N)."""
        ids = self.ids if self.w.ndim == 2 else self.ids[:, None].expand_as(self.w)
        return self.w.new_zeros(*self.w.shape[:-1], anchors).scatter_add(-1, ids, self.w)

    def adapters(self, bank: LoraBatch) -> Gated:
        """The merge as a layer computes it, straight from the bank."""
        factors = next(iter(bank.factors.values())).a
        return Gated(bank, self.gates(len(bank)).to(factors.device))


def needs_evidence(settings: MergeSettings) -> bool:
    """Whether stage 2 reads the anchors' losses (``gather_evidence``) or only the encodings."""
    return settings.retrieve == "loss" or POLICIES[settings.policy].evidence(settings)


def check_merge(settings: MergeSettings, anchors: int, labelled: bool) -> None:
    """Refuse settings that a bank of that size, or a task without labels, cannot follow: before anything is scored.

    Raises AnchorNotFound, ConfigError.
    """
    if settings.k > anchors:
        raise AnchorNotFound(
            f"merge.k is {settings.k}, but the bank has {anchors} anchors", hint="Lower merge.k, or 0 for all."
        )
    if POLICIES[settings.policy].labels and not labelled:
        raise ConfigError(
            f"policy {settings.policy!r} needs a task with labels", hint="Use merge.policy=posterior for free text."
        )


def coefficients(settings: MergeSettings, similarity: Tensor, evidence: Evidence | None = None) -> Merge:
    """Retrieve K anchors per person and weigh them by ``settings.policy``.

    Shapes: similarity (U, N), cosine of person and anchor -> Merge of (U, K).
    Source: arXiv:2511.20072, stage 2 (nearest anchors, linear merge); the policies stand in policies.py.
    Raises what ``check_merge`` does.
    """
    anchors = similarity.shape[1]
    check_merge(settings, anchors, labelled=evidence is None or evidence.labels is not None)
    if evidence is None and needs_evidence(settings):
        raise ConfigError(
            f"policy {settings.policy!r} needs the anchors' likelihood of the shots",
            hint="Give evidence=gather_evidence(…), or take a policy that needs none, such as merge.policy=similarity.",
        )
    rank_by = evidence.anchors if settings.retrieve == "loss" and evidence else similarity.double()
    ids = rank_by.topk(settings.k or anchors, dim=1, sorted=True).indices
    of = Retrieved(ids, similarity.double().gather(1, ids), evidence)
    return Merge(ids, settings.scale * POLICIES[settings.policy].weigh(settings, of))


@dataclass(frozen=True, slots=True)
class Earlier:
    """Merges of the same people's earlier items, and the number of target ``tokens`` (U,) that those items had."""

    merge: Merge
    tokens: Tensor


def fit_merge(
    base: BaseModel,
    jobs: Sequence[Job],
    anchors: LoraBatch,
    pooled: Sequence[Shared],
    settings: MergeSettings,
    *,
    similarity: Tensor | None = None,
    evidence: Evidence | None = None,
    earlier: Earlier | None = None,
    seed: int = 0,
    tokens_per_batch: int = 2048,
    on_step: OnStep | None = None,
) -> Merge:
    """Stage 2 for U people: gather the evidence that the policy reads, retrieve, weigh, and learn if the policy learns.

    ``similarity`` (U, N) is the cosine of person and anchor; policies that continue from evidence do not read it.
    With ``earlier``, ``jobs`` and ``evidence`` are of the new items only. The posterior and loss policies then return
    exactly what all items at once give; ridge and learned start from the earlier coefficients and are pulled to them;
    policies of encodings ignore ``earlier``. Raises what ``check_merge`` does.
    """
    learns = settings.policy == "learned"
    if evidence is None and needs_evidence(settings) and not (earlier and learns):
        evidence = gather_evidence(base, jobs, anchors, pooled, tokens_per_batch=tokens_per_batch, on_step=on_step)
    if earlier and learns:
        found = earlier.merge
    elif earlier and evidence:
        found = Merge(earlier.merge.ids, carried_on(settings, earlier.merge, evidence, earlier.tokens))
    else:
        if similarity is None:
            raise ConfigError(f"policy {settings.policy!r} needs the people's encodings", hint="Give similarity=….")
        found = coefficients(settings, similarity, evidence)
    found = Merge(found.ids, found.w.to(base.master_dtype))
    if not learns:
        return found
    return learn(
        base,
        jobs,
        anchors,
        pooled,
        found,
        settings.learned,
        seed=seed,
        tokens_per_batch=tokens_per_batch,
        on_step=partial(on_step, "coefficients") if on_step else None,
    )


def carried_on(settings: MergeSettings, before: Merge, evidence: Evidence, tokens: Tensor) -> Tensor:
    """Return the coefficients of all items, from those of earlier items (``tokens`` targets) and evidence of the new.

    Shapes: w of before (U, K), tokens (U,) -> (U, K).
    """
    policy = POLICIES[settings.policy]
    if not policy.evidence(settings):  # only the retrieval read evidence: the weights stay
        return before.w.double()
    near = torch.zeros_like(before.w, dtype=torch.float64)  # policies of evidence read no encodings
    earlier, rounding = before.w.double() / settings.scale, torch.finfo(before.w.dtype).eps
    retrieved = Retrieved(before.ids, near, evidence, earlier, tokens, rounding)
    return settings.scale * policy.weigh(settings, retrieved)


def learn(
    base: BaseModel,
    jobs: Sequence[Job],
    bank: LoraBatch,
    pooled: Sequence[Adapters],
    start: Merge,
    training: Training,
    groups: Sequence[int] = (),
    *,
    seed: int = 0,
    tokens_per_batch: int = 2048,
    on_step: Callable[[Step], None] | None = None,
) -> Merge:
    """The ``learned`` policy: gradient descent on the loss of the shots in the K coefficients, from ``start`` on.

    The difference to ``start`` is trained, so weight decay pulls towards ``start``. With ``groups``, a number for each
    adapted layer, layers of different groups get coefficients of their own: w is (U, L, K).
    """
    ids = start.ids.to(base.device)
    before = start.w.to(base.device, base.master_dtype)
    layers = torch.tensor(groups, device=base.device)
    shift = before.new_zeros(len(ids), max(groups) + 1, ids.shape[1]) if groups else torch.zeros_like(before)

    def weights(shift: Tensor, people: Tensor) -> Tensor:
        return before[people] + shift if not groups else before[people][:, None] + shift[:, layers]

    def adapters(parameters: Mapping[str, Tensor], people: Tensor) -> Gated:
        return Gated(bank, Merge(ids[people], weights(parameters["shift"], people)).gates(len(bank)))

    found = train(
        base,
        jobs,
        {"shift": shift},
        adapters,
        training,
        frozen=pooled,
        seed=seed,
        tokens_per_batch=tokens_per_batch,
        on_step=on_step,
    )
    return Merge(start.ids, weights(found["shift"], torch.arange(len(ids), device=base.device)).cpu())


def merged(bank: Bank, merge: Merge, settings: MergeSettings) -> Adapters:
    """A merge as the layers compute it, by ``settings.mode``.

    The exact merge of a few anchors is gathered for each person; of many, it is computed straight from the bank.
    """
    if settings.mode == "exact" and _straight(merge.ids.shape[1], len(bank)):
        return merge.adapters(bank.working)
    device = next(iter(bank.working.factors.values())).a.device
    anchors = bank.anchors.to(device) if settings.mode == "svd" else bank.working
    return PerPerson(merged_factors(anchors, merge, settings))


def _straight(k: int, anchors: int) -> bool:
    return 4 * k > anchors


def frozen_numbers(bank: Bank, settings: MergeSettings | None = None) -> Numbers:
    """Return the sizes of the adapters under a stack: the task LoRA, and a merge by ``settings`` where it is given."""
    width = sum(d + o for d, o in bank.anchors.shapes.values())
    pooled = bank.task_lora.rank * width if bank.task_lora else 0
    if settings is None:
        return Numbers(pooled=pooled)
    k, rank = settings.k or len(bank), bank.anchors.rank
    straight = settings.mode == "exact" and _straight(k, len(bank))
    own = {"exact": k * rank, "svd": settings.rank or rank, "factor": rank}[settings.mode]
    gated = straight or settings.policy == "learned"  # coefficients are learned through gates
    return Numbers(frozen=0 if straight else own * width, pooled=pooled, shared=gated * len(bank) * rank * width)


def merged_factors(anchors: LoraBatch, merge: Merge, settings: MergeSettings) -> LoraBatch:
    """A merge as factors of its own, by ``settings.mode``; exact ones have rank K * R."""
    device = next(iter(anchors.factors.values())).a.device
    ids, w = merge.ids.to(device), merge.w.to(device)
    if settings.mode == "factor":
        return merge_factor(anchors, ids, w)
    if settings.mode == "svd":  # one by one: before it is cut, a merge of all anchors is as large as the bank
        rank = settings.rank or anchors.rank
        return stack(merge_svd(anchors, one[None], its[None], rank)[0] for one, its in zip(ids, w))
    return merge_exact(anchors, ids, w)
