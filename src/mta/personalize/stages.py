"""Stages 2 and 3 for one cohort of people who are computed together: from their shots to their states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from mta.bank.bank import Bank
from mta.bank.format import check_base, read_info
from mta.config import Lora, Run, Training
from mta.errors import BankMismatch, Diverged, StoreError
from mta.lora.batch import LoraBatch, fresh
from mta.lora.layers import Adapters, PerPerson
from mta.model.base import BaseModel
from mta.model.encoders import Encoder, encode_people
from mta.personalize.adapters import stored_merges
from mta.personalize.evidence import gather_evidence
from mta.personalize.merge import (
    Earlier,
    Merge,
    fit_merge,
    keeps_gradients,
    merge_adapters,
    needs_encodings,
    needs_evidence,
)
from mta.personalize.policies import policy_of
from mta.personalize.shots import ShotGradients, ShotsJob, shots_of
from mta.personalize.work import Cohort, StateInputs, WorkItem
from mta.store import Session, Store
from mta.store.run_checkpoints import RunCheckpoints
from mta.store.state import Losses, State
from mta.system.progress import OnStep
from mta.training.checkpoint import Checkpoint
from mta.training.scoring import mean_nll
from mta.training.trainer import Job, Passes, train_loras

_SAME_FOLDER = (
    "Give workers the same folder: a shared disk, or a copy in their image. (A hub id is downloaded here only.)"
)


def adapt(
    base: BaseModel,
    jobs: Sequence[Job],
    frozen: Sequence[Adapters],
    lora: Lora,
    training: Training,
    *,
    start: LoraBatch | None = None,
    seed: int = 0,
    **passes: Unpack[Passes],
) -> LoraBatch:
    """Train one LoRA per person on their shots: U jobs -> a batch of U.

    ``frozen`` are the adapters that each person already has, indexed by job: the task LoRA and their merge. With rank 1
    the result is MTA's stack; over the task LoRA alone it is OPPU. Training starts from ``start``, or from a hash of
    (seed, the job's key, layer). Source: arXiv:2511.20072, stage 3.
    """
    keys = [job.key for job in jobs]
    start = start or fresh(base.targets, lora.rank, lora.scale, seed, keys, base.master_dtype)
    return train_loras(base, jobs, start, training, frozen=frozen, seed=seed, **passes)


@dataclass(frozen=True, slots=True)
class Fitted:
    """Merges and stacks of a cohort, and its shots' losses under the pooled model and the merges where these are known.

    ``stacks`` is None before stage 3, and where stacks are switched off. ``stacks_kept``: they are of an earlier state.
    """

    merge: Merge
    adapters: list[Adapters]  # of ``merge``
    stacks: LoraBatch | None = None
    stacks_kept: bool = False
    pooled_losses: Sequence[float] | None = None
    merged_losses: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Stages:
    """What stages 2 and 3 need. Cohorts that are interrupted leave ``checkpoints``.

    Without a ``session``, the caller keeps the states.
    """

    base: BaseModel
    bank: Bank
    run: Run
    encoder: Callable[[], Encoder]  # called only if the policy reads encodings
    on_step: OnStep | None = None
    checkpoints: RunCheckpoints | None = None
    session: Session | None = None

    @property
    def opener(self) -> StagesOpener:
        """What opens the same base, bank, and store in another process."""
        session = self.session
        where = (session.store.files.url, session.store.identity(), session.known) if session else None
        return StagesOpener(self.base.as_loaded(self.run), self.bank.folder.resolve(), self.bank.hash, where)

    def states(self, cohort: Cohort) -> list[State | Diverged]:
        """Compute the states of a cohort; ``Diverged`` for each person whose training diverged."""
        jobs = self.jobs(cohort)
        fitted = self.stack(cohort, jobs, self.merge(cohort, jobs))
        return self.as_states(cohort, jobs, fitted)

    def jobs(self, cohort: Cohort) -> list[ShotsJob]:
        """Return the training examples of each person: the items that their state does not hold yet."""
        alternatives = policy_of(self.run.merge).labels
        jobs = [shots_of(self.base, self.bank.task, item.new_items, alternatives) for item in cohort.items]
        return [replace(job, examples_before=item.items_in_stack) for job, item in zip(jobs, cohort.items)]

    def merge(self, cohort: Cohort, jobs: Sequence[ShotsJob], earlier: Earlier | None = None) -> Fitted:
        """Stage 2: fit merges to ``jobs``, from ``earlier`` merges on where there are any."""
        base, bank, settings, tokens = self.base, self.bank, self.run.merge, cohort.tokens_per_batch
        anchors, task_adapters, evidence, similarity = bank.device_anchors, bank.task_adapters, None, None
        if needs_evidence(settings, grown=earlier is not None):
            evidence = gather_evidence(
                base, jobs, anchors, task_adapters, tokens_per_batch=tokens, on_step=self.on_step
            )
        if needs_encodings(settings, grown=earlier is not None):
            vectors = encode_people(self.encoder(), bank.task, cohort.people, bank.info.run.bank.encode)
            similarity = bank.similarity(vectors)
        merge = fit_merge(
            base,
            jobs,
            anchors,
            task_adapters,
            settings,
            similarity=similarity,
            evidence=evidence,
            calibration=bank.calibration,
            earlier=earlier,
            seed=self.run.seed,
            tokens_per_batch=tokens,
            on_step=partial(self.on_step, "coefficients") if self.on_step else None,
        )
        fitted = self.with_merge(merge)
        if evidence:
            return replace(fitted, pooled_losses=(-evidence.pooled_loglik / evidence.tokens).tolist())
        gradients, mu = merge.gradients, bank.calibration.mu if bank.calibration else None
        if earlier or gradients is None or mu is None or mu.any():
            return fitted
        targets = torch.tensor([job.targets for job in jobs])  # at mu = 0, the model is the pooled one
        return replace(fitted, pooled_losses=(-gradients.loglik / targets).tolist())

    def with_merge(self, merge: Merge, stacks: LoraBatch | None = None) -> Fitted:
        """Return merges and stacks with the adapters of the merges."""
        return Fitted(merge, merge_adapters(self.bank, merge), stacks)

    def stack(self, cohort: Cohort, jobs: Sequence[Job], fitted: Fitted) -> Fitted:
        """Stage 3: train stacks over the merges, on from the stacks that ``fitted`` has. None if switched off."""
        settings, start, first = self.run.stack, fitted.stacks, list[Tensor]()
        if not settings.enabled:
            return replace(fitted, stacks=None)
        stacks = adapt(
            self.base,
            jobs,
            [*self.bank.task_adapters, *fitted.adapters],
            settings.lora,
            settings.training,
            start=start,
            seed=self.run.seed,
            tokens_per_batch=cohort.tokens_per_batch,
            checkpoint=self._checkpoint(cohort),
            on_step=partial(self.on_step, "stack") if self.on_step else None,
            on_first=first.append,
        )
        whole = not start and all(len(job.examples) <= settings.training.batch_size for job in jobs)
        known = whole and bool(first[0].isfinite().all())
        return replace(fitted, stacks=stacks, merged_losses=first[0].tolist() if known else None)

    def as_states(self, cohort: Cohort, jobs: Sequence[Job], fitted: Fitted) -> list[State | Diverged]:
        """Assemble the states of a cohort. The losses of the jobs are computed unless they are known."""
        merge = fitted.merge
        read = fitted.stacks is not None or merge.gradients is None  # else an update needs the gradient alone
        losses = self.losses(jobs, fitted, cohort.tokens_per_batch, merged=read)
        settings = StateInputs.of(self.base, self.bank, self.run).digest
        stacks = fitted.stacks.to(torch.device("cpu")) if fitted.stacks else None

        def state_of(i: int, item: WorkItem) -> State | Diverged:
            if isinstance(measured := losses[i], Diverged):
                return measured
            untrained = item.earlier.untrained if item.earlier else 0
            untrained += len(jobs[i].examples) if fitted.stacks_kept else 0
            try:
                return State(
                    bank=self.bank.hash,
                    anchors=tuple(merge.ids[i].tolist()),
                    w=tuple(merge.w[i].tolist()),
                    policy=self.run.merge.policy,
                    history=item.person.digest(),
                    work=item.work,
                    seed=self.run.seed,
                    stack=stacks.select([i]) if stacks else None,
                    losses=measured.after(item.earlier.losses if item.earlier else None),
                    settings=settings,
                    gradient=tuple(merge.gradients.sums[i].tolist()) if merge.gradients else (),
                    loglik=float(merge.gradients.loglik[i]) if merge.gradients else 0.0,
                    shots=len(item.person.items),
                    untrained=untrained,
                )
            except Diverged as error:
                return error

        return [state_of(i, item) for i, item in enumerate(cohort.items)]

    def losses(
        self, jobs: Sequence[Job], fitted: Fitted, tokens_per_batch: int, *, merged: bool = True
    ) -> list[Losses | Diverged]:
        """Return the losses of each job: one pass for each field, except those that are known or not asked for."""

        def under(*added: Adapters) -> list[float]:
            adapters = [*self.bank.task_adapters, *added]
            on_step = partial(self.on_step, "losses") if self.on_step else None
            return mean_nll(self.base, jobs, adapters, tokens_per_batch=tokens_per_batch, on_step=on_step)

        none: Sequence[float | None] = [None] * len(jobs)
        stacked = under(*fitted.adapters, PerPerson(fitted.stacks)) if fitted.stacks else none
        targets = [job.targets for job in jobs]
        pooled_losses, merged_losses = fitted.pooled_losses or under(), fitted.merged_losses or none
        if merged and not fitted.merged_losses:
            merged_losses = under(*fitted.adapters) if fitted.adapters else pooled_losses

        def of(pooled: float, merged: float | None, stacked: float | None, tokens: int) -> Losses | Diverged:
            try:
                return Losses(pooled, merged, stacked, tokens)
            except Diverged as error:
                return error

        return list(map(of, pooled_losses, merged_losses, stacked, targets))

    def earlier_merge(self, cohort: Cohort) -> Merge:
        """Return the merges that an update starts from, with the gradients if the policy reads these."""
        states, gradients = cohort.earlier_states, None
        if keeps_gradients(self.run.merge, self.bank.calibration):
            sums = torch.tensor([state.gradient for state in states], dtype=torch.float64)
            loglik = torch.tensor([state.loglik for state in states], dtype=torch.float64)
            gradients = ShotGradients(sums, loglik, torch.tensor([state.shots for state in states]))
        return replace(stored_merges(states, self.base.master_dtype), gradients=gradients)

    def remove_checkpoint(self, cohort: Cohort) -> None:
        """Remove the checkpoint of a cohort. Call this after the cohort's states are saved."""
        if checkpoint := self._checkpoint(cohort):
            checkpoint.remove()

    def _checkpoint(self, cohort: Cohort) -> Checkpoint | None:
        return self.checkpoints.checkpoint(cohort.digest) if self.checkpoints else None


@dataclass(frozen=True, slots=True)
class StagesOpener:
    """Opens ``Stages`` in a worker. Paths and addresses must mean the same on all machines.

    ``store`` is the store's address and identity, and the tombstones that the session knows. Raises BankMismatch or
    StoreError if another bank or store is found, and load errors.
    """

    run: Run
    bank: Path
    hash: str
    store: tuple[str, str, frozenset[str]] | None

    def __call__(self) -> Stages:
        session, bank = self._session(), self.bank
        if not bank.is_dir():
            raise BankMismatch(f"a worker found no bank at {bank}", hint=_SAME_FOLDER)
        base = BaseModel.of(self.run, partial(check_base, bank, read_info(bank), self.run.base))
        opened = Bank.open(bank, base)
        if opened.hash != self.hash:
            raise BankMismatch(
                f"a worker found bank {opened.hash[:8]}… at {bank}, expected {self.hash[:8]}…", hint=_SAME_FOLDER
            )
        encoder = cache(partial(opened.encoder, base, self.run.encoder))
        return Stages(base, opened, self.run, encoder, session=session)

    def _session(self) -> Session | None:
        if self.store is None:
            return None
        url, identity, known = self.store
        store = Store(url)
        if store.identity() != identity:
            raise StoreError(
                f"a worker found another store, or none, at {url}",
                hint="Give an address that means the same on all machines: a shared disk, a bucket.",
            )
        return Session(store, known)
