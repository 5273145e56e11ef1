"""Stage 2: retrieve anchors for each person and fit the coefficients of the person's merge, from shots only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from mta.bank.bank import Bank
from mta.bank.calibration.laplace import Calibration
from mta.config import MergeSettings, Training
from mta.errors import AnchorNotFound, ConfigError
from mta.lora.batch import LoraBatch
from mta.lora.layers import Adapters, Gated, PerPerson, Shared
from mta.lora.merge import merge_exact
from mta.model.base import BaseModel
from mta.model.footprint import ParameterCounts
from mta.personalize.evidence import Evidence
from mta.personalize.policies import PolicyInput, policy_of
from mta.personalize.shots import ShotGradients
from mta.system.device import moved
from mta.system.progress import Step
from mta.training.gates import gate_gradients
from mta.training.packing import TOKENS
from mta.training.trainer import Job, Passes, train


@dataclass(frozen=True, slots=True)
class Merge:
    """Merges of U people: anchor numbers ``ids`` (U, K), coefficients ``w`` (U, K), or (U, L, K) per layer.

    ``gradients`` are the gradients from which ``w`` was solved, if the policy reads gradients.
    """

    ids: Tensor
    w: Tensor
    gradients: ShotGradients | None = None

    def select(self, people: Sequence[int]) -> Merge:
        """Return the merges of some of the people."""
        rows = list(people)
        gradients = self.gradients and ShotGradients(*(part[rows] for part in self.gradients))
        return Merge(self.ids[rows], self.w[rows], gradients)

    def gates(self, anchors: int) -> Tensor:
        """Return the coefficients over all anchors, (U, N) or (U, L, N)."""
        ids = self.ids if self.w.ndim == 2 else self.ids[:, None].expand_as(self.w)
        return self.w.new_zeros(*self.w.shape[:-1], anchors).scatter_add(-1, ids, self.w)

    def adapters(self, anchors: LoraBatch) -> Gated:
        """Return the merge as adapters that are computed directly from the anchors."""
        return Gated(anchors, self.gates(len(anchors)).to(anchors.device))


def needs_evidence(settings: MergeSettings, grown: bool = False) -> bool:
    """Return whether stage 2 reads the anchors' losses (``gather_evidence``).

    ``grown``: merges of earlier items exist. Their anchors stay, and policies that learn start from these merges.
    """
    policy = policy_of(settings)
    if policy.gradients or (grown and policy.learns):
        return False
    return policy.reads_evidence(settings)


def needs_encodings(settings: MergeSettings, grown: bool = False) -> bool:
    """Return whether stage 2 reads people's encodings, to retrieve the nearest anchors or to weight anchors.

    ``grown``: merges of earlier items exist, and their anchors stay.
    """
    policy = policy_of(settings)
    if policy.gradients or (grown and policy.learns):
        return False
    reads = policy.reads_evidence(settings)
    retrieves = bool(settings.k) or not (policy.all_anchors or reads)
    return policy.cosines or (retrieves and not (grown and reads))


def keeps_gradients(settings: MergeSettings, calibration: Calibration | None) -> bool:
    """Return whether merges hold gradients; False if a person's own shots do not change the coefficients."""
    return policy_of(settings).gradients and calibration is not None and calibration.personal


def check_merge(settings: MergeSettings, anchors: int, labelled: bool, calibrated: bool = True) -> None:
    """Check settings before anything is scored.

    Raises AnchorNotFound if ``merge.k`` exceeds the number of anchors. Raises ConfigError if the policy needs labels or
    a calibration that do not exist, or if it merges all anchors and ``merge.k`` is lower.
    """
    if settings.k > anchors:
        raise AnchorNotFound(
            f"merge.k is {settings.k}, but the bank has {anchors} anchors", hint="Lower merge.k, or use 0 for all."
        )
    policy = policy_of(settings)
    if policy.gradients and not calibrated:
        raise ConfigError(
            f"policy {settings.policy!r} needs a calibrated bank",
            hint="Calibrate the bank (mta bank calibrate), or use merge.policy=posterior.",
        )
    if policy.gradients and 0 < settings.k < anchors:
        raise ConfigError(
            f"policy {settings.policy!r} merges all {anchors} anchors, but merge.k is {settings.k}",
            hint="Use merge.k=0, or another policy.",
        )
    if policy.labels and not labelled:
        raise ConfigError(
            f"policy {settings.policy!r} needs a task with labels", hint="Use merge.policy=posterior for free text."
        )


def can_merge(settings: MergeSettings, anchors: int, labelled: bool, calibrated: bool) -> bool:
    """Return whether ``check_merge`` passes. The policy ``auto`` always fits the bank."""
    if settings.policy == "auto":
        return settings.k <= anchors
    try:
        check_merge(settings, anchors, labelled, calibrated)
    except (AnchorNotFound, ConfigError):
        return False
    return True


def coefficients(settings: MergeSettings, similarity: Tensor, evidence: Evidence | None = None) -> Merge:
    """Retrieve K anchors per person and compute their coefficients by ``settings.policy``.

    Shapes: similarity (U, N), cosine of person and anchor -> Merge of (U, K).
    Source: arXiv:2511.20072, stage 2 (nearest anchors, linear merge); the policies are in policies.py.
    Raises AnchorNotFound, ConfigError.
    """
    anchors = similarity.shape[1]
    check_merge(settings, anchors, labelled=evidence is None or evidence.labels is not None)
    ids = similarity.double().argsort(dim=1, descending=True, stable=True)[:, : settings.k or anchors]
    known = PolicyInput(ids, similarity.double().gather(1, ids), evidence)
    return Merge(ids, settings.scale * policy_of(settings).weigh(settings, known))


@dataclass(frozen=True, slots=True)
class Earlier:
    """Merges from the same people's earlier items; ``tokens`` (U,) is the number of target tokens of these items."""

    merge: Merge
    tokens: Tensor


def fit_merge(
    base: BaseModel,
    jobs: Sequence[Job],
    anchors: LoraBatch,
    task_adapters: Sequence[Shared],
    settings: MergeSettings,
    *,
    similarity: Tensor | None = None,
    evidence: Evidence | None = None,
    calibration: Calibration | None = None,
    earlier: Earlier | None = None,
    seed: int = 0,
    **passes: Unpack[Passes],
) -> Merge:
    """Stage 2 for U people: retrieve anchors, compute coefficients, and train them if the policy learns.

    ``similarity`` (U, N) is the cosine of person and anchor, required if ``needs_encodings``.
    ``evidence`` is required if ``needs_evidence``. With ``earlier``, ``jobs`` and ``evidence`` have only the new items.
    Then laplace and posterior return the result of all items, and policies that learn start from the earlier
    coefficients. For policies that read only encodings, give the encodings of all items.
    ``calibration`` is the bank's, for the laplace policy.
    Raises AnchorNotFound, ConfigError.
    """
    if policy_of(settings).gradients:
        return _from_gradients(base, jobs, anchors, task_adapters, settings, calibration, earlier, **passes)
    training = policy_of(settings).learns
    if earlier and training:
        merge = earlier.merge
    elif earlier and evidence:
        w = updated_coefficients(settings, earlier.merge, evidence, earlier.tokens, similarity)
        merge = Merge(earlier.merge.ids, w)
    else:
        if similarity is None and needs_encodings(settings):
            raise ConfigError(f"policy {settings.policy!r} needs the people's encodings", hint="Give similarity=….")
        if similarity is None:
            similarity = torch.zeros(len(jobs), len(anchors))
        merge = coefficients(settings, similarity, evidence)
    merge = Merge(merge.ids, merge.w.to(base.master_dtype))
    if training is None:
        return merge
    start = Merge(merge.ids, merge.w / settings.scale)
    learned = learn(base, jobs, anchors, task_adapters, start, training(settings), seed=seed, **passes)
    return Merge(learned.ids, settings.scale * learned.w)


def _from_gradients(
    base: BaseModel,
    jobs: Sequence[Job],
    anchors: LoraBatch,
    task_adapters: Sequence[Shared],
    settings: MergeSettings,
    calibration: Calibration | None,
    earlier: Earlier | None,
    **passes: Unpack[Passes],
) -> Merge:
    """Stage 2 of policies that read gradients: one forward and one backward pass over the shots of all people.

    No pass is needed where the calibration found that a person's own shots do not help.
    """
    check_merge(settings, len(anchors), labelled=True, calibrated=calibration is not None)
    assert calibration is not None  # checked above
    ids = torch.arange(len(anchors)).expand(len(jobs), -1)
    if not calibration.personal:
        w = settings.scale * calibration.mu.expand(len(jobs), -1)
        return Merge(ids, w.to(base.master_dtype))
    gates = gate_gradients(
        base, jobs, anchors, calibration.mu, task_adapters, tokens_per_batch=passes.get("tokens_per_batch", TOKENS)
    )
    gradients = ShotGradients(gates.gradients, gates.loglik, torch.tensor([len(job.examples) for job in jobs]))
    if earlier:
        assert earlier.merge.gradients  # such merges are made by this policy alone
        gradients = earlier.merge.gradients.plus(gradients)
    if on_step := passes.get("on_step"):
        shots = sum(len(job.examples) for job in jobs)
        on_step(Step(1, len(jobs), shots, shots))
    known = PolicyInput(ids, torch.zeros(ids.shape).double(), gradients=gradients, calibration=calibration)
    w = settings.scale * policy_of(settings).weigh(settings, known)
    return Merge(ids, w.to(base.master_dtype), gradients)


def updated_coefficients(
    settings: MergeSettings, before: Merge, evidence: Evidence, tokens: Tensor, similarity: Tensor | None = None
) -> Tensor:
    """Return coefficients for all items, from the merge of earlier items (``before``) and evidence of new items.

    Shapes: ``before.w`` (U, K); ``tokens`` (U,), number of target tokens of the earlier items; ``similarity`` (U, N) of
    all items, if the policy also reads cosines -> (U, K).
    """
    policy = policy_of(settings)
    unread = torch.zeros_like(before.w, dtype=torch.float64)
    cosines = unread if similarity is None else similarity.double().gather(1, before.ids)
    earlier, rounding = before.w.double() / settings.scale, torch.finfo(before.w.dtype).eps
    known = PolicyInput(before.ids, cosines, evidence, earlier, tokens, rounding)
    return settings.scale * policy.weigh(settings, known)


def learn(
    base: BaseModel,
    jobs: Sequence[Job],
    anchors: LoraBatch,
    task_adapters: Sequence[Adapters],
    start: Merge,
    training: Training,
    groups: Sequence[int] = (),
    *,
    seed: int = 0,
    **passes: Unpack[Passes],
) -> Merge:
    """Fit the K coefficients to the shots by gradient descent from ``start`` (for policies that learn).

    The difference to ``start`` is trained, so weight decay pulls towards ``start``. ``groups`` gives the group
    number of each adapted layer. Each group has its own coefficients, and w is (U, L, K).
    """
    ids = start.ids.to(base.device)
    before = start.w.to(base.device, base.master_dtype)
    layers = torch.tensor(groups, device=base.device)
    shift = before.new_zeros(len(ids), max(groups) + 1, ids.shape[1]) if groups else torch.zeros_like(before)

    def weights(shift: Tensor, people: Tensor) -> Tensor:
        return before[people] + shift if not groups else before[people][:, None] + shift[:, layers]

    def adapters(parameters: Mapping[str, Tensor], people: Tensor) -> Gated:
        (people,) = moved(base.device, people)
        return Merge(ids[people], weights(parameters["shift"], people)).adapters(anchors)

    trained = train(base, jobs, {"shift": shift}, adapters, training, frozen=task_adapters, seed=seed, **passes)
    return Merge(start.ids, weights(trained["shift"], torch.arange(len(ids), device=base.device)).cpu())


def merge_adapters(bank: Bank, merge: Merge) -> list[Adapters]:
    """Return a merge as adapters; none if all coefficients are 0.

    If K is small, each person's factors are gathered. Otherwise the merge is computed directly from the bank.
    """
    if not merge.w.any():
        return []
    if _is_direct(merge.ids.shape[1], len(bank)):
        return [merge.adapters(bank.device_anchors)]
    return [PerPerson(merge_loras(bank.device_anchors, merge))]


def _is_direct(k: int, anchors: int) -> bool:
    """Return whether a merge of k anchors is computed directly from the bank."""
    return 4 * k > anchors


def frozen_numbers(bank: Bank, settings: MergeSettings | None = None) -> ParameterCounts:
    """Return the parameter counts of adapters under a stack: the task LoRA and, if ``settings`` are given, a merge."""
    width = sum(map(sum, bank.anchors.shapes.values()))
    task_lora = bank.task_lora.rank * width if bank.task_lora else 0
    if settings is None:
        return ParameterCounts(task_lora=task_lora)
    k, rank = settings.k or len(bank), bank.anchors.rank
    direct = _is_direct(k, len(bank))
    # Gradients of coefficients go through gates; ``auto`` may have them.
    gated = settings.policy == "auto" or bool(policy_of(settings).learns) or policy_of(settings).gradients
    every = len(bank) * rank * width
    frozen, shared = 0 if direct else k * rank * width, every if direct or gated else 0
    return ParameterCounts(frozen=frozen, task_lora=task_lora, shared=shared, gated=every if gated else 0)


def merge_loras(anchors: LoraBatch, merge: Merge) -> LoraBatch:
    """Return each person's merge as factors of rank K * R, without loss."""
    return merge_exact(anchors, merge.ids.to(anchors.device), merge.w.to(anchors.device))
