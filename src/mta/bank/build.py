"""Stages 0 and 1: from people to a bank on disk.

A killed build resumes. The same people, base, and settings give the same tensors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mta.bank.anchors import choose_anchors
from mta.bank.calibrate import calibrate, drawn
from mta.bank.calibration import CalibrationInfo
from mta.bank.card import card
from mta.bank.format import (
    ANCHORS,
    CALIBRATION,
    INDEX,
    INFO,
    OURS,
    PUBLISHED,
    SCHEMA,
    STALE,
    TASK_LORA,
    BankInfo,
    Members,
    check_base,
    file_hashes,
    identity,
    read_adapters,
    read_info,
    seal,
    write_info,
    write_limit,
)
from mta.bank.worker import Anchors, BankWorker, Pool, anchor_start, open_worker, train_anchors, train_pool
from mta.config import Run, parse_size
from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.distributed.executor import Executor, LocalExecutor, Outcome
from mta.errors import BankError, InputError
from mta.lora.batch import LoraBatch, stack
from mta.lora.peft import CARD, read_peft, write_peft
from mta.model.base import BaseModel
from mta.model.encoders import Encoder
from mta.model.footprint import Numbers
from mta.system.atomic import asides_in, copy_file, make_folder, write_tensors, write_text
from mta.system.progress import OnStep, Step
from mta.tracking import run_folder
from mta.tracking.run_folder import RunFolder
from mta.tracking.trackers import Track
from mta.training.checkpoint import Checkpoint
from mta.training.plan import Plan, plan_cohorts
from mta.training.trainer import Job

# Settings that the work key leaves out: they do not affect a bank, or the key holds a fingerprint instead.
_NOT_IN_KEY = {"merge", "stack", "base", "encoder", "task", "device", "gradient_checkpointing"}


def build_bank(
    base: BaseModel,
    task: Task,
    encoder: Encoder,
    task_people: Sequence[Person],
    candidates: Sequence[Person],
    run: Run,
    out: Path,
    *,
    task_lora: Path | None = None,
    executor: Executor | None = None,
    on_step: OnStep | None = None,
    resume: bool = True,
    command: str = "",
    track: Track | None = None,
) -> None:
    """Train the task LoRA on ``task_people`` and one meta-LoRA per anchor among ``candidates``; write them to ``out``.

    ``task_lora`` is the folder of a task LoRA that was trained earlier with the same settings and people; it is copied.
    A killed build resumes from its last checkpoint, unless ``resume`` is False. A finished bank is not changed, except
    for the task's ``answer_tokens``, which does not affect training.
    Settings, steps, and ``command`` are recorded in the folder (``mta.tracking.run_folder``); ``track`` opens a tracker
    for the steps.
    Source: arXiv:2511.20072, stage 1; clusters: its README, "most active": Per-Pcs. Raises InputError, BankError.
    """
    task_people, candidates, task_name = _by_id(task_people), _by_id(candidates), run.task
    run = base.as_loaded(run.model_copy(update={"task": task.name, "encoder": encoder.name}))
    work = _with_files(task_lora, work_key(base, task, encoder, task_people, candidates, run))
    if _is_finished(out, work):
        return write_limit(out, task)
    if not resume:
        shutil.rmtree(out / "work", ignore_errors=True)
        (out / run_folder.METRICS).unlink(missing_ok=True)
    record = RunFolder(
        folder=out,
        kind="bank",
        base=base,
        settings=_settings(run, task_name),
        about={"seeds": [run.seed]},
        work=work,
        command=command,
        track=track,
        on_step=on_step,
    )
    build = _Build(base, task, run, out, work, executor or LocalExecutor(), record, task_lora)
    # Choose anchors and plan before stage 0, which takes hours: too few people or too little memory fails at once.
    able, vectors, chosen = choose_anchors(task, encoder, candidates, run.bank, run.seed)
    anchors = [able[i].latest(run.bank.max_items) for i in chosen]
    jobs, plan = build.planned(anchors)
    with record:
        pooled = build.task_lora(task_people)
        bank = build.meta_loras(jobs, plan, pooled)
        build.write(bank, vectors[chosen])
        calibration, others = None, list[Person]()
        if run.calibration.enabled:
            others = drawn([able[i] for i in range(len(able)) if i not in chosen], run.calibration, run.seed)
            calibration = build.calibration(bank, pooled, others)
        secret = json.dumps([work, _digests(task_people, candidates)])  # the work key is not secret: it is in bank.json
        ids = ([person.id for person in group] for group in (task_people, able, anchors, others))
        build.finish(encoder, plan, [len(able[i].items) for i in chosen], Members.of(secret, *ids), calibration)
    _remove_work(out)  # if the build is killed before this, the next call removes the files


def calibrate_bank(
    folder: Path,
    base: BaseModel,
    people: Sequence[Person],
    run: Run,
    *,
    executor: Executor | None = None,
    on_step: OnStep | None = None,
) -> None:
    """Calibrate a finished bank on people behind neither its anchors nor its task LoRA; the bank gets a new hash.

    Settings are those of ``run.calibration``. An interrupted calibration resumes. Raises InputError if nobody is left,
    BankCorrupt, BankMismatch.
    """
    info = read_info(folder)
    check_base(folder, info, base.name, base.fingerprint)
    anchors, pooled = read_adapters(folder, info)
    settings = info.run.model_copy(update={"calibration": run.calibration, "memory": run.memory})
    outside = [one for one in _by_id(people) if not {"anchor", "task LoRA"} & set(info.members.artefacts_of(one.id))]
    outside = drawn(outside, run.calibration, info.run.seed)
    if not outside:
        raise InputError(
            f"{len(people)} people are given, but all are in the bank or have fewer than two items",
            hint="Give people who are behind neither its anchors nor its task LoRA.",
        )
    work = seal({"bank": info.hash, "people": _digests(outside), "run": settings.model_dump(mode="json")})
    found = calibrate(
        base,
        Task.model_validate(info.task),
        anchors,
        pooled,
        outside,
        settings,
        executor=executor,
        checkpoint=lambda name: Checkpoint(folder / "work" / f"{name}.safetensors", work),
        on_step=partial(on_step, "calibration") if on_step else None,
    )
    write_tensors(folder / CALIBRATION, found.tensors(), {})
    changed = {
        "run": info.run.model_copy(update={"calibration": run.calibration}),
        "members": info.members.calibrated_on([person.id for person in outside]),
        "files": info.files | file_hashes(folder, [CALIBRATION]),
        "calibration": found.info,
    }
    info = info.model_copy(update=changed)
    info = info.model_copy(update={"hash": identity(info)})
    write_text(folder / CARD, card(info))
    write_info(folder, info)
    _remove_work(folder)


def work_key(
    base: BaseModel, task: Task, encoder: Encoder, task_people: Sequence[Person], candidates: Sequence[Person], run: Run
) -> str:
    """Return a hash of all inputs that affect the tensors of a bank."""
    settings, people = run.model_dump(mode="json", exclude=_NOT_IN_KEY), _digests(task_people, candidates)
    parts = [base.fingerprint, encoder.fingerprint, task.identity, settings, people]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(slots=True)
class _Build:
    """A bank under construction; ``out/work`` holds markers, checkpoints, and finished anchors until it is complete."""

    base: BaseModel
    task: Task
    run: Run
    out: Path
    work: str
    executor: Executor
    record: RunFolder
    given: Path | None = None
    cut: dict[str, int] = field(default_factory=lambda: {"items left out": 0, "texts shortened": 0})

    def task_lora(self, people: Sequence[Person]) -> LoraBatch | None:
        """Run stage 0 and return the task LoRA; None if it is switched off."""
        settings = self.run.task_lora
        if not settings.enabled:
            return None
        folder = self.out / TASK_LORA
        if self.given and not self._done("task"):
            for aside in asides_in(folder, "*"):  # of a killed copy
                aside.unlink()
            for file in sorted(self.given.iterdir()):
                copy_file(file, folder / file.name)
            self._mark("task")
        if not self._done("task"):
            pool = Pool(self.task, tuple(people))
            self.record.stage_begins()
            checkpoint = partial(self._checkpoint, "")
            local = BankWorker(self.base, self.run, None, checkpoint, self.record.step)
            (found,) = self.executor.run(train_pool, [pool], local, self._remote_worker(None))
            write_peft(folder, _trained(found), self.base.name, fan_in_fan_out=self.base.fan_in_fan_out)
            if not self.executor.in_process:
                self.record.step("task LoRA", Step(1, 1, 1, 1))
            self._mark("task")
            checkpoint(pool.name).remove()
        return read_peft(folder).to(self.base.device)

    def planned(self, anchors: Sequence[Person]) -> tuple[list[Job], Plan]:
        """Return the jobs of stage 1, one per anchor, and the plan of their cohorts."""
        make_folder(self.out / "work")
        examples = [[self.base.prompts.example(self.task, item) for item in person.items] for person in anchors]
        self.cut["texts shortened"] = sum(example.cut > 0 for anchor in examples for example in anchor)
        # Jobs are numbered, so that no written file identifies an anchor.
        jobs = [Job(f"anchor-{n}", anchor) for n, anchor in enumerate(examples)]
        one, most = anchor_start(self.base, self.run, jobs[:1]).tensors(), self.executor.most
        pooled = self.run.task_lora.enabled * self.run.task_lora.lora.rank * self.base.footprint.sums.width
        plan = plan_cohorts(
            self.base,
            jobs,
            one,
            parse_size(self.run.memory),
            below=Numbers(pooled=pooled),
            most=most,
            threads=self.executor.threads,
        )
        self.record.about["plan"] = plan.digest
        return jobs, plan

    def meta_loras(self, jobs: Sequence[Job], plan: Plan, pooled: LoraBatch | None) -> LoraBatch:
        """Run stage 1 and return the meta-LoRAs; trained cohorts are saved, so a resumed build does not repeat them."""
        pieces = [
            Anchors(number, tuple(jobs[n] for n in cohort), plan.tokens_per_batch)
            for number, cohort in enumerate(plan.cohorts)
        ]
        checkpoint = partial(self._checkpoint, plan.digest)
        results = {piece.name: checkpoint(piece.name, "safetensors") for piece in pieces}
        trained = {name: saved[0] for name, result in results.items() if (saved := result.load())}
        done = sum(len(piece) for piece in pieces if piece.name in trained)
        self.record.stage_begins()
        local = BankWorker(self.base, self.run, pooled, checkpoint, self.record.step)
        missing = [piece for piece in pieces if piece.name not in trained]
        for found in self.executor.run(train_anchors, missing, local, self._remote_worker(pooled)):
            name = found.piece.name
            trained[name] = _trained(found).tensors()
            results[name].save(trained[name], {})
            checkpoint(name).remove()
            done += len(found.piece)
            if not self.executor.in_process:
                self.record.step("anchors", Step(len(trained), len(found.piece), done, len(jobs)))
        return stack(LoraBatch.of_tensors(trained[piece.name], self.run.bank.lora.scale) for piece in pieces)

    def write(self, bank: LoraBatch, vectors: Tensor) -> None:
        """Write the anchors and their vectors."""
        write_tensors(self.out / ANCHORS, bank.tensors(), {"scale": repr(bank.scale)})
        write_tensors(self.out / INDEX, {"vectors": vectors.contiguous()})

    def calibration(self, bank: LoraBatch, pooled: LoraBatch | None, people: Sequence[Person]) -> CalibrationInfo:
        """Calibrate the bank on candidates who are not anchors, and write what it found."""
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

    def _remote_worker(self, pooled: LoraBatch | None) -> Callable[[], BankWorker]:
        """Return a function that opens a worker in another process."""
        on_cpu = pooled and pooled.to(torch.device("cpu"))
        return partial(open_worker, self.base.as_loaded(self.run), self.base.fingerprint, on_cpu)

    def _checkpoint(self, plan: str, name: str, kind: str = "checkpoint") -> Checkpoint:
        """Return the checkpoint of a piece in training, or the result of a finished piece (kind ``safetensors``)."""
        work = hashlib.sha256(f"{self.work}/{plan}/{name}".encode()).hexdigest()
        return Checkpoint(self.out / "work" / f"{name}.{kind}", work)

    def finish(
        self, encoder: Encoder, plan: Plan, items: Sequence[int], members: Members, calibration: CalibrationInfo | None
    ) -> None:
        """Write the description last: a folder with ``bank.json`` is complete."""
        self.cut["items left out"] = sum(max(n - self.run.bank.max_items, 0) for n in items)
        self.record.outcome = {"anchors": len(items), "items": sum(items), **self.cut}
        names = [ANCHORS, INDEX, *([CALIBRATION] if calibration else [])]
        if self.run.task_lora.enabled:
            names += [f"{TASK_LORA}/{file.name}" for file in sorted((self.out / TASK_LORA).iterdir())]
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
            cut=self.cut,
            seconds=run_folder.seconds_of(self.out, self.work),
            members=members,
            files=file_hashes(self.out, names),
            hash="",  # set below: a hash of the other fields
            calibration=calibration,
        )
        info = info.model_copy(update={"hash": identity(info)})
        write_text(self.out / CARD, card(info))
        write_info(self.out, info)

    def _done(self, stage: str) -> bool:
        marker = self.out / "work" / f"{stage}.done"
        return marker.is_file() and marker.read_text() == self.work

    def _mark(self, stage: str) -> None:
        write_text(self.out / "work" / f"{stage}.done", self.work)


def _with_files(folder: Path | None, work: str) -> str:
    """Return the work key of a build that copies the files of a folder, if one is given."""
    if folder is None:
        return work
    hashes = file_hashes(folder, sorted(file.name for file in folder.iterdir()))
    return hashlib.sha256(json.dumps([work, hashes]).encode()).hexdigest()


def _settings(run: Run, task: str) -> dict[str, Any]:
    """Return the settings for config.yaml; a user's own task is named by its file."""
    own = {"task": str(Path(task).resolve())} if Path(task).is_file() else {}
    return run.model_dump(mode="json") | own


def _trained(found: Outcome[Any, LoraBatch]) -> LoraBatch:
    if found.result is None:
        raise BankError(f"the bank cannot be trained: {found.error}", hint="Fix this, and build again: it resumes.")
    return found.result


def _digests(*groups: Sequence[Person]) -> list[list[list[str]]]:
    return [[[person.id, person.digest()] for person in group] for group in groups]


def _by_id(people: Sequence[Person]) -> list[Person]:
    return sorted(people, key=lambda person: person.id)


def _remove_work(out: Path) -> None:
    """Remove the work folder, and temporary files of killed builds."""
    shutil.rmtree(out / "work", ignore_errors=True)
    for name in OURS - {STALE, PUBLISHED}:  # other processes may be writing these two
        for aside in asides_in(out, name):
            if aside.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.unlink(missing_ok=True)


def _is_finished(out: Path, work: str) -> bool:
    """Return whether the bank with this work key is complete. Raises BankError for another bank, or foreign files."""
    if (out / INFO).exists():
        if read_info(out).work == work:
            _remove_work(out)
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
