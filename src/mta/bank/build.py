"""Stages 0 and 1: from people to a bank on disk.

A killed build resumes. The same people, base, and settings give the same tensors, on GPUs up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from mta.bank.calibrate import calibrate, plan_of
from mta.bank.calibration import CalibrationInfo
from mta.bank.card import card
from mta.bank.format import (
    ANCHORS,
    CALIBRATING,
    CALIBRATION,
    INDEX,
    INFO,
    OURS,
    PUBLISHED,
    SCHEMA,
    STALE,
    TASK_LORA,
    BankInfo,
    file_hashes,
    named,
    read_info,
    write_info,
    write_task,
)
from mta.bank.keys import uncalibrated, with_old_defaults, work_key
from mta.bank.members import Members
from mta.bank.newcomers import known_people
from mta.bank.roles import Roles, choose_roles
from mta.bank.selection import pooled_items
from mta.bank.worker import BankWorker, LoraPiece, open_worker, train_piece
from mta.config import Lora, Run, parse_size
from mta.data.history import Item, Person
from mta.data.tasks.task import Task
from mta.distributed.executor import Executor, LocalExecutor
from mta.errors import BankError, DataError
from mta.lora.batch import LoraBatch, concatenate
from mta.lora.layers import Shared
from mta.lora.peft import CARD, CONFIG, WEIGHTS, read_peft, write_peft
from mta.model.base import BaseModel
from mta.model.encoders import Encoder
from mta.model.footprint import ParameterCounts
from mta.system.atomic import copy_file, unfinished_in, write_tensors, write_text
from mta.system.progress import OnStep, Step
from mta.tracking import run_folder
from mta.tracking.run_folder import RunFolder
from mta.tracking.trackers import Track
from mta.training.checkpoint import Checkpoint
from mta.training.plan import Plan, parameters_of, plan_cohorts
from mta.training.scoring import mean_nll
from mta.training.trainer import Job

log = logging.getLogger("mta")

LOSSES = "held-out losses of the task LoRA"  # one for each round, in run.json


def build_bank(
    base: BaseModel,
    task: Task,
    encoder: Encoder,
    task_people: Sequence[Person],
    candidates: Sequence[Person],
    run: Run,
    out: Path,
    *,
    held_out: Sequence[Person] = (),
    task_lora: Path | None = None,
    executor: Executor | None = None,
    on_step: OnStep | None = None,
    resume: bool = True,
    command: str = "",
    track: Track | None = None,
) -> None:
    """Train the task LoRA and one meta-LoRA per anchor among ``candidates``; write them to ``out``.

    The task LoRA is trained on ``task_people`` and on the ``pooled_candidates``, while the loss of ``held_out``
    people falls; by default a tenth of ``task_people``.
    ``task_lora`` is the folder of a task LoRA that was trained earlier with the same settings and people; it is copied.
    A killed build resumes from its last checkpoint, unless ``resume`` is False. A finished bank is not changed, except
    for fields of its task that do not affect training (``UNTRAINED``).
    Settings, steps, and ``command`` are recorded in the folder (``mta.tracking.run_folder``); ``track`` opens a tracker
    for the steps.
    Source: arXiv:2511.20072, stage 1; clusters: its README, "most active": Per-Pcs. Raises InputError, BankError.
    """
    if task_lora:
        read_peft(task_lora)  # raises InputError for a folder without an adapter
    task_people, candidates, held_out = (
        sorted(people, key=lambda person: person.id) for people in (task_people, candidates, held_out)
    )
    own_task = {"task": str(Path(run.task).resolve())} if Path(run.task).is_file() else {}
    run = base.as_loaded(run.model_copy(update={"task": task.name, "encoder": encoder.name}))
    groups = (task_people, candidates, *([held_out] if held_out else []))
    histories = [[[person.id, person.digest()] for person in group] for group in groups]

    def key(settings: Run) -> str:
        return work_key(base, task, encoder, histories, settings, task_lora)

    work, training_key = key(run), key(uncalibrated(run))  # training_key: of stages 0 and 1
    if _is_finished(out, work, training_key, key(with_old_defaults(run))):
        return write_task(out, task)
    if not resume:
        shutil.rmtree(out / "work", ignore_errors=True)
        (out / run_folder.METRICS).unlink(missing_ok=True)
    record = RunFolder(
        folder=out,
        kind="bank",
        base=base,
        settings=run.model_dump(mode="json") | own_task,
        about={"seeds": [run.seed]},
        work=work,
        command=command,
        track=track,
        on_step=on_step,
    )
    build = _Build(base, task, run, out, work, training_key, executor or LocalExecutor(), record)
    # Roles and plans come before stage 0, which takes hours: too few people or too little memory fails at once.
    roles = choose_roles(task, encoder, task_people, candidates, held_out, run)
    jobs, plan = build.planned(roles)
    with record:
        pooled = build.task_lora(roles, task_lora) if run.task_lora.enabled else None
        bank = build.meta_loras(jobs, plan, pooled)
        write_tensors(out / ANCHORS, bank.tensors(), {"scale": repr(bank.scale)})
        write_tensors(out / INDEX, {"vectors": roles.vectors[roles.chosen].contiguous()})
        calibration = build.calibration(bank, pooled, roles.calibrating)
        secret = json.dumps([work, histories])  # the work key is not secret: it is in bank.json
        build.finish(encoder, plan, roles, roles.members(secret), calibration)
    remove_work(out)  # if the build is killed before this, the next call removes the files


@dataclass(slots=True)
class _Build:
    """A bank under construction; ``out/work`` holds markers, checkpoints, and finished anchors until it is complete."""

    base: BaseModel
    task: Task
    run: Run
    out: Path
    work: str
    training_key: str  # the work key of stages 0 and 1, which do not depend on the calibration
    executor: Executor
    record: RunFolder

    def job(self, key: str, items: Iterable[Item]) -> Job:
        """Return the job of one LoRA. Raises DataError, which names the job, for an item that does not fit."""
        try:
            return Job(key, [self.base.prompts.example(self.task, item) for item in items])
        except DataError as error:
            raise DataError(f"items of {key}: {error.message}", hint=error.hint) from None

    def planned(self, roles: Roles) -> tuple[list[Job], Plan]:
        """Return the jobs of the anchors and their plan; plan the calibration, too. Raises MemoryBudgetError."""
        run, anchors = self.run, [person.latest(self.run.bank.max_items) for person in roles.anchors]
        # Jobs are numbered, so that no written file identifies an anchor.
        jobs = [self.job(f"anchor-{n}", person.items) for n, person in enumerate(anchors)]
        plan = self.plan(jobs, run.bank.lora, frozen=run.task_lora.lora if run.task_lora.enabled else None)
        plan_of(self.base, known_people(self.base, self.task, roles.calibrating, run.calibration), len(anchors), run)
        self.record.about["plan"] = plan.digest
        return jobs, plan

    def plan(self, jobs: Sequence[Job], lora: Lora, frozen: Lora | None = None) -> Plan:
        """Plan the cohorts of jobs that train ``lora``, over ``frozen`` if there is one."""
        below = ParameterCounts(pooled=frozen.rank * self.base.footprint.sums.width if frozen else 0)
        numbers, memory, executor = parameters_of(self.base, lora), parse_size(self.run.memory), self.executor
        return plan_cohorts(self.base, jobs, numbers, memory, below=below, most=executor.most, threads=executor.threads)

    def task_lora(self, roles: Roles, given: Path | None) -> LoraBatch:
        """Run stage 0, or copy the task LoRA from the folder ``given``, and return the task LoRA."""
        folder, done = self.out / TASK_LORA, self.out / "work" / "task.done"
        if not done.is_file() or done.read_text() != self.training_key:
            if given:
                for temporary in unfinished_in(folder, "*"):  # of a killed copy
                    temporary.unlink()
                for name in (CONFIG, WEIGHTS):
                    copy_file(given / name, folder / name)
            else:
                settings, seed = self.run.task_lora, self.run.seed
                trained = self.rounds(*pooled_items(roles.task, settings, seed, roles.held_out, roles.also))
                write_peft(folder, trained, self.base.name, fan_in_fan_out=self.base.fan_in_fan_out)
            write_text(done, self.training_key)
        return read_peft(folder).to(self.base.device)

    def rounds(self, items: Sequence[Item], held_out: Sequence[Item]) -> LoraBatch:
        """Train the task LoRA, and train on while the loss of held-out items falls; return the best."""
        job, held = self.job("task", items), self.job("held out", held_out)
        # Both are planned before the first round, which may take hours: too little memory fails at once.
        tokens = self.plan([job], self.run.task_lora.lora).tokens_per_batch
        if not held.examples:
            return self.round(0, 1, job, tokens)
        tested = self.plan([held], self.run.task_lora.lora).tokens_per_batch
        most, losses, best = self.run.task_lora.rounds, list[float](), None
        for number in range(most):
            found = self.round(number, most, job, tokens, best)
            losses.append(self.loss(found, held, tested))
            if best and not losses[-1] < min(losses[:-1]):
                break
            best = found
        self.record.about[LOSSES] = losses
        assert best is not None  # there is at least one round
        return best

    def round(self, number: int, most: int, job: Job, tokens: int, start: LoraBatch | None = None) -> LoraBatch:
        """Train the task LoRA once over all items, from ``start``; a finished round is saved until the bank is."""
        name = f"task-{number}" if number else "task"
        result = self._checkpoint("", name, "safetensors")
        if saved := result.load():
            return LoraBatch.of_tensors(saved[0], self.run.task_lora.lora.scale).in_order(self.base.targets)

        def on_step(stage: str, step: Step) -> None:  # progress counts all rounds that there may be
            each = step.examples_total
            self.record.step(stage, replace(step, examples=step.examples + number * each, examples_total=most * each))

        piece = LoraPiece(name, "task LoRA", (replace(job, key=name),), tokens, start)
        ((_, found),) = self._trained([piece], "", on_step=on_step)
        result.save(found.tensors(), {})
        self._checkpoint("", name).remove()
        if not self.executor.in_process:
            self.record.step("task LoRA", Step(number + 1, 1, number + 1, most))
        return found

    def loss(self, task_lora: LoraBatch, job: Job, tokens: int) -> float:
        """Return the loss of a job's examples per target token."""
        over = [Shared(task_lora.to(self.base.device, self.base.dtype))]
        return mean_nll(self.base, [job], over, tokens_per_batch=tokens)[0]

    def meta_loras(self, jobs: Sequence[Job], plan: Plan, pooled: LoraBatch | None) -> LoraBatch:
        """Run stage 1 and return the meta-LoRAs; trained cohorts are saved, so a resumed build does not repeat them."""
        pieces = [
            LoraPiece(f"anchors-{number:03}", "anchors", tuple(jobs[n] for n in cohort), plan.tokens_per_batch)
            for number, cohort in enumerate(plan.cohorts)
        ]
        results = {piece.name: self._checkpoint(plan.digest, piece.name, "safetensors") for piece in pieces}
        found = {name: saved[0] for name, result in results.items() if (saved := result.load())}
        done = sum(len(piece) for piece in pieces if piece.name in found)
        missing = [piece for piece in pieces if piece.name not in found]
        for piece, trained in self._trained(missing, plan.digest, pooled):
            found[piece.name] = trained.tensors()
            results[piece.name].save(found[piece.name], {})
            self._checkpoint(plan.digest, piece.name).remove()
            done += len(piece)
            if not self.executor.in_process:
                self.record.step("anchors", Step(len(found), len(piece), done, len(jobs)))
        scale = self.run.bank.lora.scale
        loras = [LoraBatch.of_tensors(found[piece.name], scale) for piece in pieces]
        return concatenate(loras).in_order(self.base.targets)

    def calibration(
        self, bank: LoraBatch, pooled: LoraBatch | None, people: Sequence[Person]
    ) -> CalibrationInfo | None:
        """Calibrate the bank on candidates who are not anchors, and write what it found; None if this is off."""
        (self.out / CALIBRATION).unlink(missing_ok=True)
        if not self.run.calibration.enabled:
            return None
        self.record.stage_begins()
        found = calibrate(
            self.base,
            self.task,
            bank,
            pooled,
            people,
            self.run,
            executor=self.executor,
            checkpoint=partial(self._checkpoint, "calibration", kind="safetensors"),
            on_step=partial(self.record.step, "calibration"),
        )
        write_tensors(self.out / CALIBRATION, found.tensors(), {})
        return found.info

    def _trained(
        self, pieces: Sequence[LoraPiece], plan: str, pooled: LoraBatch | None = None, on_step: OnStep | None = None
    ) -> Iterator[tuple[LoraPiece, LoraBatch]]:
        """Train pieces on the executor over ``pooled``; yield each with its LoRAs. Raises BankError."""
        self.record.stage_begins()
        local = BankWorker(self.base, self.run, pooled, partial(self._checkpoint, plan), on_step or self.record.step)
        on_cpu = pooled and pooled.to(torch.device("cpu"))
        remote = partial(open_worker, self.base.as_loaded(self.run), self.base.fingerprint, on_cpu)
        for found in self.executor.run(train_piece, pieces, local, remote):
            if found.result is None:
                hint = "Fix this, and build again: it resumes."
                raise BankError(f"the bank cannot be trained: {found.error}", hint=hint)
            yield found.piece, found.result

    def _checkpoint(self, plan: str, name: str, kind: str = "checkpoint") -> Checkpoint:
        """Return the checkpoint of a piece in training, or the result of a finished piece (kind ``safetensors``)."""
        key = self.work if plan == "calibration" else self.training_key
        work = hashlib.sha256(f"{key}/{plan}/{name}".encode()).hexdigest()
        return Checkpoint(self.out / "work" / f"{name}.{kind}", work)

    def finish(
        self, encoder: Encoder, plan: Plan, roles: Roles, members: Members, calibration: CalibrationInfo | None
    ) -> None:
        """Write the description last: a folder with ``bank.json`` is complete."""
        items = [len(person.items) for person in roles.anchors]
        left_out = sum(max(n - self.run.bank.max_items, 0) for n in items)
        cut = {"items left out": left_out, "texts shortened": plan.shortened}
        self.record.outcome = {"anchors": len(items), "items": sum(items), **cut}
        names = [ANCHORS, INDEX, *([CALIBRATION] if calibration else [])]
        if self.run.task_lora.enabled:
            names += [f"{TASK_LORA}/{name}" for name in (CONFIG, WEIGHTS)]
        info = BankInfo(
            version=SCHEMA,
            base=self.base.name,
            base_fingerprint=self.base.fingerprint,
            base_note=self.base.note,
            task=self.task.model_dump(mode="json"),
            encoder=self.run.encoder,
            encoder_fingerprint=encoder.fingerprint,
            run=self.run,
            work=self.work,
            plan=plan.digest,
            items=tuple(items),
            cut=cut,
            seconds=run_folder.seconds_of(self.out, self.work),
            members=members,
            files=file_hashes(self.out, names),
            hash="",  # set below: a hash of the other fields
            calibration=calibration,
        )
        info = named(info)
        write_text(self.out / CARD, card(info))
        write_info(self.out, info)


def remove_work(out: Path) -> None:
    """Remove the work folder, and temporary files of killed builds."""
    shutil.rmtree(out / "work", ignore_errors=True)
    for name in OURS - {STALE, PUBLISHED}:  # other processes may be writing these two
        for temporary in unfinished_in(out, name):
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)


def _is_finished(out: Path, work: str, *older: str) -> bool:
    """Return whether a bank with one of these work keys is complete; ``older`` are those without a calibration.

    Raises BankError for another bank, or foreign files.
    """
    if (out / INFO).exists():
        if (info := read_info(out)).work in (work, *older):
            if info.work != work and info.calibration is None:
                log.warning("%s was built without a calibration: add one with  mta bank calibrate", out)
            if not (out / CALIBRATING).exists():
                remove_work(out)
            return True
        raise BankError(
            f"{out} holds a bank built from other people, another base or other settings",
            hint=f"Choose another folder with --out, or remove it first: rm -r {out}",
        )
    if other := sorted(path.name for path in out.glob("[!.]*") if path.name not in OURS):
        raise BankError(
            f"{out} holds {other[0]}, which does not belong to a bank",
            hint="Choose an empty or a new folder with --out.",
        )
    return False
