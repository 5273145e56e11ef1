"""Stages 0 and 1, from people to a bank on disk; resumable, and the same work gives the same tensors."""

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
from mta.bank.card import card
from mta.bank.format import (
    ANCHORS,
    INDEX,
    INFO,
    MEMBERS,
    OURS,
    SCHEMA,
    TASK_LORA,
    BankInfo,
    Members,
    file_hashes,
    identity,
    read_info,
    write_info,
    write_limit,
)
from mta.bank.worker import Anchors, BankWorker, Pool, anchor_start, open_worker, train_anchors, train_pool
from mta.config import Run, parse_size
from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.distributed.executor import Executor, LocalExecutor, Outcome
from mta.errors import BankError
from mta.lora.batch import LoraBatch, stack
from mta.lora.peft import read_peft, write_peft
from mta.model.base import BaseModel
from mta.model.encoders import Encoder
from mta.model.footprint import Numbers
from mta.system.atomic import copy_file, make_folder, write_tensors, write_text
from mta.system.progress import OnStep, Step
from mta.tracking import run_folder
from mta.tracking.run_folder import RunFolder
from mta.tracking.trackers import Track
from mta.training.checkpoint import Checkpoint
from mta.training.plan import Plan, plan_cohorts
from mta.training.trainer import Job

_NO_WORK = {
    "merge",
    "stack",
    "base",
    "encoder",
    "task",
    "device",
    "gradient_checkpointing",
}  # identified otherwise, or free


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
    """Train the task LoRA on ``task_people`` and a meta-LoRA per anchor among ``candidates``; write both to ``out``.

    ``task_lora`` is the folder of one that was trained before, by these settings on these people: it is copied.
    A build that was killed goes on from its last checkpoint unless ``resume`` is off; a finished one is left as it is,
    but for the task's ``answer_tokens``, which decides nothing that is trained.
    The run's settings, steps, and ``command`` are kept beside it (``mta.tracking.run_folder``); ``track`` opens a
    tracker for the steps as well.
    Source: arXiv:2511.20072, stage 1; clusters: its README, "most active": Per-Pcs. Raises InputError, BankError.
    """
    task_people, candidates, asked = _by_id(task_people), _by_id(candidates), run.task
    run = _as_built(run, base, task, encoder)
    work = _with_files(task_lora, work_key(base, task, encoder, task_people, candidates, run))
    if _finished(out, work):
        return write_limit(out, task)
    _begin(out, resume)
    kept = RunFolder(
        folder=out,
        kind="bank",
        base=base,
        settings=_asked(run, asked),
        about={"seeds": [run.seed]},
        work=work,
        command=command,
        track=track,
        on_step=on_step,
    )
    site = _Build(base, task, run, out, work, executor or LocalExecutor(), kept, task_lora)
    # Anchors first: that takes seconds, and if they are too few, stage 0 would be hours for nothing.
    able, vectors, chosen = choose_anchors(task, encoder, candidates, run.bank, run.seed)
    anchors = [able[i].latest(run.bank.max_items) for i in chosen]
    jobs, plan = site.planned(anchors)  # before stage 0 too: too little memory is said at once
    with kept:
        pooled = site.task_lora(task_people)
        bank = site.meta_loras(jobs, plan, pooled)
        site.write(bank, vectors[chosen])
        secret = json.dumps([work, _digests(task_people, candidates)])  # work alone, which bank.json tells, is none
        ids = ([person.id for person in group] for group in (task_people, able, anchors))
        site.finish(encoder, plan, [len(able[i].items) for i in chosen], Members.of(secret, *ids))
    _tidy(out)  # what a build has that ends before this, the next one removes


def work_key(
    base: BaseModel, task: Task, encoder: Encoder, task_people: Sequence[Person], candidates: Sequence[Person], run: Run
) -> str:
    """What decides the tensors of a bank, as one hash."""
    settings, people = run.model_dump(mode="json", exclude=_NO_WORK), _digests(task_people, candidates)
    parts = [base.fingerprint, encoder.fingerprint, task.identity, settings, people]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(slots=True)
class _Build:
    """A bank under construction: what is finished lies in ``out/work`` until the whole is."""

    base: BaseModel
    task: Task
    run: Run
    out: Path
    work: str
    executor: Executor
    kept: RunFolder
    given: Path | None = None
    cut: dict[str, int] = field(default_factory=lambda: {"items left out": 0, "texts shortened": 0})

    def task_lora(self, people: Sequence[Person]) -> LoraBatch | None:
        """Stage 0, or None where it is switched off."""
        settings = self.run.task_lora
        if not settings.enabled:
            return None
        folder = self.out / TASK_LORA
        if self.given and not self._done("task"):
            for left in folder.glob(f".*.{'[0-9a-f]' * 32}"):  # of a copy that was killed
                left.unlink()
            for file in sorted(self.given.iterdir()):
                copy_file(file, folder / file.name)
            self._mark("task")
        if not self._done("task"):
            pool = Pool(self.task, tuple(people))
            report = self._reporter("task LoRA")
            stopped = partial(self._checkpoint, "")
            here = BankWorker(self.base, self.run, None, stopped, lambda _, step: report(step))
            (found,) = self.executor.run(train_pool, [pool], here, self._elsewhere(None))
            write_peft(folder, _trained(found), self.base.name, fan_in_fan_out=self.base.fan_in_fan_out)
            if not self.executor.in_process:
                report(Step(1, 1, 1, 1))
            self._mark("task")
            stopped(pool.name).remove()
        return read_peft(folder).to(self.base.device)

    def planned(self, anchors: Sequence[Person]) -> tuple[list[Job], Plan]:
        """What stage 1 trains: the anchors' examples, and who is trained together."""
        make_folder(self.out / "work")
        examples = [[self.base.prompts.example(self.task, item) for item in person.items] for person in anchors]
        self.cut["texts shortened"] = sum(e.cut > 0 for theirs in examples for e in theirs)
        # Numbered, so that nothing written says who an anchor is.
        jobs = [Job(f"anchor-{n}", theirs) for n, theirs in enumerate(examples)]
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
        self.kept.about["plan"] = plan.digest
        return jobs, plan

    def meta_loras(self, jobs: Sequence[Job], plan: Plan, pooled: LoraBatch | None) -> LoraBatch:
        """Stage 1, cohort by cohort: what is trained is kept, so a build that is stopped does not train it again."""
        pieces = [
            Anchors(number, tuple(jobs[n] for n in cohort), plan.tokens_per_batch)
            for number, cohort in enumerate(plan.cohorts)
        ]
        stopped = partial(self._checkpoint, plan.digest)
        kept = {piece.name: self._checkpoint(plan.digest, piece.name, "safetensors") for piece in pieces}
        trained = {name: saved[0] for name, file in kept.items() if (saved := file.load())}
        report, done = self._reporter("anchors"), sum(len(piece) for piece in pieces if piece.name in trained)
        here = BankWorker(self.base, self.run, pooled, stopped, lambda _, step: report(step))
        lacking = [piece for piece in pieces if piece.name not in trained]
        for found in self.executor.run(train_anchors, lacking, here, self._elsewhere(pooled)):
            name = found.piece.name
            trained[name] = _trained(found).tensors()
            kept[name].save(trained[name], {})
            stopped(name).remove()
            done += len(found.piece)
            if not self.executor.in_process:
                report(Step(len(trained), len(found.piece), done, len(jobs)))
        return stack(LoraBatch.of_tensors(trained[piece.name], self.run.bank.lora.scale) for piece in pieces)

    def write(self, bank: LoraBatch, vectors: Tensor) -> None:
        """The anchors and their index."""
        write_tensors(self.out / ANCHORS, bank.tensors(), {"scale": repr(bank.scale)})
        write_tensors(self.out / INDEX, {"vectors": vectors.contiguous()})

    def _elsewhere(self, pooled: LoraBatch | None) -> Callable[[], BankWorker]:
        on_cpu = pooled and pooled.to(torch.device("cpu"))
        return partial(open_worker, self.base.as_loaded(self.run), self.base.fingerprint, on_cpu)

    def _checkpoint(self, plan: str, name: str, kind: str = "checkpoint") -> Checkpoint:
        """Of a piece of work: one in training, or (``safetensors``) one that is done."""
        work = hashlib.sha256(f"{self.work}/{plan}/{name}".encode()).hexdigest()
        return Checkpoint(self.out / "work" / f"{name}.{kind}", work)

    def finish(self, encoder: Encoder, plan: Plan, items: Sequence[int], members: Members) -> None:
        """Write the description last: a folder with ``bank.json`` is whole."""
        self.cut["items left out"] = sum(max(n - self.run.bank.max_items, 0) for n in items)
        self.kept.outcome = {"anchors": len(items), "items": sum(items), **self.cut}
        names = [ANCHORS, INDEX]
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
            hash="",  # of all the rest
        )
        info = info.model_copy(update={"hash": identity(info)})
        write_text(self.out / "README.md", card(info))
        write_info(self.out, info)

    def _reporter(self, stage: str) -> Callable[[Step], None]:
        self.kept.stage_begins()
        return partial(self.kept.step, stage)

    def _done(self, stage: str) -> bool:
        marker = self.out / "work" / f"{stage}.done"
        return marker.is_file() and marker.read_text() == self.work

    def _mark(self, stage: str) -> None:
        write_text(self.out / "work" / f"{stage}.done", self.work)


def _as_built(run: Run, base: BaseModel, task: Task, encoder: Encoder) -> Run:
    """The run with what was really used, so that whoever opens the bank loads the same."""
    return base.as_loaded(run.model_copy(update={"task": task.name, "encoder": encoder.name}))


def _with_files(folder: Path | None, work: str) -> str:
    """The key of work that begins from the files of a folder."""
    if folder is None:
        return work
    hashes = file_hashes(folder, sorted(file.name for file in folder.iterdir()))
    return hashlib.sha256(json.dumps([work, hashes]).encode()).hexdigest()


def _begin(out: Path, resume: bool) -> None:
    """A folder for what is finished; unless it is to ``resume``, what a stopped build has left there is not used."""
    if not resume:
        shutil.rmtree(out / "work", ignore_errors=True)
        (out / run_folder.METRICS).unlink(missing_ok=True)


def _asked(run: Run, task: str) -> dict[str, Any]:
    """The settings as somebody gives them again: a task of one's own is found by its file alone."""
    own = {"task": str(Path(task).resolve())} if Path(task).is_file() else {}
    return run.model_dump(mode="json") | own


def _trained(found: Outcome[Any, LoraBatch]) -> LoraBatch:
    if found.result is None:
        raise BankError(f"the bank cannot be trained: {found.error}", hint="Mend that, and build again: it goes on.")
    return found.result


def _digests(*groups: Sequence[Person]) -> list[list[list[str]]]:
    return [[[person.id, person.digest()] for person in group] for group in groups]


def _by_id(people: Sequence[Person]) -> list[Person]:
    return sorted(people, key=lambda person: person.id)


def _tidy(out: Path) -> None:
    """Remove the work folder, and what killed runs had written aside and never renamed."""
    names = (
        INFO,
        MEMBERS,
        ANCHORS,
        INDEX,
        TASK_LORA,
        "README.md",
        run_folder.RUN,
        run_folder.CONFIG,
    )
    for left in (out / "work", *(path for name in names for path in out.glob(f".{name}.{'[0-9a-f]' * 32}"))):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _finished(out: Path, work: str) -> bool:
    """Whether this very bank is there. Raises BankError if another one is, or what is no bank at all."""
    if (out / INFO).exists():
        if read_info(out).work == work:
            _tidy(out)
            return True
        raise BankError(
            f"{out} holds a bank built from other people, another base or other settings",
            hint=f"Choose another folder with --out, or remove it first: rm -r {out}",
        )
    if other := sorted(path.name for path in out.glob("[!.]*") if path.name not in OURS):
        raise BankError(
            f"{out} holds something that is no bank's: {other[0]}", hint="Choose an empty or a new folder with --out."
        )
    return False
