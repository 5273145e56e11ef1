"""Stages 0 and 1: from people to a bank on disk.

A killed build resumes. The same people, base, and settings give the same tensors, on GPUs up to rounding.
"""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch.nn.functional import normalize

from mta.bank.anchors import Roles, choose_roles, train_anchors
from mta.bank.calibration.calibrate import calibrate, size_of_passes
from mta.bank.calibration.info import CalibrationInfo
from mta.bank.calibration.people import Subject, measured_items, subjects_of
from mta.bank.card import write_described
from mta.bank.context import Build, BuildContext, BuildKeys
from mta.bank.format import (
    ANCHORS,
    CALIBRATION,
    INDEX,
    INFO,
    OURS,
    PUBLISHED,
    STALE,
    TASK_LORA,
    BankInfo,
    file_hashes,
    read_info,
    write_task,
)
from mta.bank.groups import Groups, group_job, train_groups
from mta.bank.task_lora import pooled_items, train_task_lora
from mta.data.earlier import as_shown, with_history
from mta.data.history import Item, named_items
from mta.data.tasks.load import task_file
from mta.errors import BankError, BankRefused
from mta.lora.batch import LoraBatch
from mta.lora.peft import CONFIG, WEIGHTS
from mta.system.atomic import exclusive, unfinished_in, write_tensors, write_text
from mta.tracking import run_folder
from mta.tracking.run_folder import RunFolder
from mta.training.plan import Plan
from mta.training.trainer import Job

log = logging.getLogger("mta")
BEGUN = Path("work", "key")  # of a build: what it trains


def build_bank(build: Build) -> None:
    """Train the task LoRA and one meta-LoRA per anchor among the candidates; write them to ``build.out``.

    The task LoRA is trained on ``task_people``, and on candidates (``mta.bank.task_lora.pooled_candidates``), while the
    loss of ``held_out`` people falls; by default a tenth of ``task_people``. A given ``task_lora`` is copied.
    A killed build resumes from its last checkpoint. A finished bank is not changed, except for
    fields of its task that do not affect training (``UNTRAINED``).
    Source: arXiv:2511.20072, stage 1 (``select_anchors``); the task LoRA is our choice. Raises InputError, BankError.
    """
    context = _context(build)
    if _is_finished(context):
        return write_task(context.out, context.task)
    # Roles and plans come before stage 0, which takes hours: too few people or too little memory fails at once.
    roles, run = choose_roles(context), context.run
    context = replace(context, chosen=(*roles.chosen, *(person.id for person in roles.behind_anchors)))
    pooled = pooled_items(roles.task_people, run.task_lora, run.seed, roles.held_out, roles.pooled_candidates)
    _check_lengths(context, roles, [*chain(*pooled)] if run.task_lora.enabled and not context.task_lora else [])
    trained, tested = (as_shown(context.task, roles.pooled, items, run.task_lora.history) for items in pooled)
    jobs, plan = _anchor_jobs(context, roles)
    with exclusive(context.out):  # another process may have finished or begun a build since the first look
        if _is_finished(context):
            return write_task(context.out, context.task)
        with context.record:
            context.record.begin()
            write_text(context.out / BEGUN, context.keys.training)
            task_lora = train_task_lora(context, trained, tested) if run.task_lora.enabled else None
            if not run.task_lora.enabled:  # of an earlier build that was begun with one
                shutil.rmtree(context.out / TASK_LORA, ignore_errors=True)
            anchors = _train(context, roles, jobs, plan, task_lora)
            context = replace(context, chosen=(*context.chosen, anchors.digest))
            _finish(context, plan, roles, anchors, _calibrate(context, roles, anchors, task_lora))
        remove_work(context.out)  # if the build is killed before this, the next call removes the files


def _context(build: Build) -> BuildContext:
    """Return the build with people in the order of ids, whole settings, keys, and the record of this sitting."""
    groups = [build.task_people, build.candidates, build.held_out]
    task_people, candidates, held_out = (sorted(people, key=lambda person: person.id) for people in groups)
    own_task = {"task": str(file.resolve())} if (file := task_file(build.run.task)) else {}
    named = build.run.model_copy(update={"task": build.task.name, "encoder": build.encoder.name})
    run = build.base.as_loaded(named)
    hashed = [task_people, candidates, *([held_out] if held_out else [])]
    keys = BuildKeys.of(build, run, hashed)
    record = RunFolder(
        folder=build.out,
        kind="bank",
        base=build.base,
        settings=run.model_dump(mode="json") | own_task,
        about={"seeds": [run.seed]},
        work=keys.training,  # a build with another calibration resumes the same training
        command=build.command,
        on_step=build.on_step,
        locked=True,
    )
    given = vars(build) | {"task_people": task_people, "candidates": candidates, "held_out": held_out, "run": run}
    return BuildContext(**given, keys=keys, record=record)


def _train(context: BuildContext, roles: Roles, jobs: Sequence[Job], plan: Plan, task_lora: LoraBatch | None) -> Groups:
    """Train the anchors over the task LoRA, and write them with their vectors."""
    if context.run.bank.choose == "groups":
        made = train_groups(context, roles, jobs, plan, task_lora)
    else:
        items = [min(len(person.items), context.run.bank.max_items) for person in roles.anchors]
        loras = train_anchors(context, jobs, plan, task_lora)
        made = Groups(loras, [[one] for one in roles.anchors], items, plan.shortened)
    rows = {person.id: vector for person, vector in zip(roles.eligible, roles.vectors)}
    means = [torch.stack([rows[person.id] for person in group]).mean(0) for group in made.people]
    vectors = torch.stack(
        [mean if len(group) == 1 else normalize(mean, dim=0) for mean, group in zip(means, made.people)]
    )
    write_tensors(context.out / ANCHORS, made.loras.tensors(), {"scale": repr(made.loras.scale)})
    write_tensors(context.out / INDEX, {"vectors": vectors})
    return made


def _calibrate(
    context: BuildContext, roles: Roles, anchors: Groups, task_lora: LoraBatch | None
) -> CalibrationInfo | None:
    """Calibrate the bank on candidates who are behind no anchor."""
    (context.out / CALIBRATION).unlink(missing_ok=True)
    if not context.run.calibration.enabled:
        return None
    context.record.stage_begins()
    base, task, run, executor = context.base, context.task, context.run, context.executor
    kept, report = context.calibration_result, partial(context.record.step, "calibration")
    calibration = calibrate(
        base, task, anchors.loras, task_lora, roles.calibrating, run, executor=executor, checkpoint=kept, on_step=report
    )
    write_tensors(context.out / CALIBRATION, calibration.tensors(), {})
    return calibration.info


def _check_lengths(context: BuildContext, roles: Roles, pooled: Sequence[Item]) -> None:
    """Raise DataError, which names person and item, for an item to be trained on that is too long."""
    used = {id(item) for item in pooled}
    used |= {id(item) for one in roles.behind_anchors for item in one.latest(context.run.bank.max_items).items}
    measured = measured_items(roles.calibrating, context.run.calibration)
    used |= {id(item) for parts in measured for item in chain(*parts)}
    people = {one.id: one for one in (*roles.task_people, *roles.held_out, *roles.eligible)}
    context.base.prompts.check(context.task, named_items(people.values(), used))


def _anchor_jobs(context: BuildContext, roles: Roles) -> tuple[list[Job], Plan]:
    """Return the jobs of the anchors and their plan; plan the calibration, too. Raises MemoryBudgetError."""
    base, run = context.base, context.run
    shown = [with_history(context.task, person, run.task_lora.history) for person in roles.anchors]
    anchors = [person.latest(run.bank.max_items) for person in shown]
    # Jobs are numbered, so that no written file identifies an anchor.
    jobs = [context.job(f"anchor-{n}", person.items) for n, person in enumerate(anchors)]
    frozen = run.task_lora.lora if run.task_lora.enabled else None
    plan = context.plan(jobs, run.bank.lora, frozen)
    subjects = subjects_of(base, context.task, roles.calibrating, run)
    if run.bank.choose == "groups":  # of any group: the groups are known only later
        job = group_job(context, "group", roles.behind_anchors)
        context.plan([job], run.bank.lora, frozen)
        subjects += [Subject((example,), ()) for example in job.examples]  # each is asked for a gradient, too
    most = max([len(anchors), *run.bank.sizes])
    size_of_passes(base, subjects, most, run, on_gpu=context.executor.on_gpu)
    context.record.about["plan"] = plan.digest
    return jobs, plan


def _finish(
    context: BuildContext, plan: Plan, roles: Roles, anchors: Groups, calibration: CalibrationInfo | None
) -> None:
    """Write the description last: a folder with ``bank.json`` is complete."""
    items = anchors.items
    left_out = sum(len(person.items) for group in anchors.people for person in group) - sum(items)
    cut = {"items left out": left_out, "texts shortened": anchors.shortened}
    context.record.outcome = {"anchors": len(items), "items": sum(items), **cut}
    names = [ANCHORS, INDEX, *([CALIBRATION] if calibration else [])]
    if context.run.task_lora.enabled:
        names += [f"{TASK_LORA}/{name}" for name in (CONFIG, WEIGHTS)]
    info = BankInfo(
        base=context.base.name,
        base_fingerprint=context.base.fingerprint,
        base_note=context.base.note,
        task=context.task,
        encoder=context.run.encoder,
        encoder_fingerprint=context.encoder.fingerprint,
        run=context.run,
        work=context.keys.whole,
        plan=plan.digest,
        items=tuple(items),
        people=tuple(map(len, anchors.people)),
        tried=anchors.tried,
        cut=cut,
        seconds=run_folder.seconds_of(context.out, context.keys.training),
        members=roles.members(context.keys.secret, anchors.people),
        files=file_hashes(context.out, names),
        calibration=calibration,
    )
    write_described(context.out, info)


def remove_work(out: Path) -> None:
    """Remove the work folder, and temporary files of killed builds."""
    shutil.rmtree(out / "work", ignore_errors=True)
    for name in OURS - {STALE, PUBLISHED}:  # other processes may be writing these
        for temporary in unfinished_in(out, name):
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)


def _is_finished(context: BuildContext) -> bool:
    """Return whether the bank is complete, perhaps without its calibration.

    Raises BankError for foreign files, BankRefused for another bank and for an interrupted build with other keys: its
    finished work would be overwritten.
    """
    out, keys = context.out, context.keys
    if (out / INFO).exists():
        if (info := read_info(out)).work in (keys.whole, keys.training):
            if info.work != keys.whole and info.calibration is None:
                log.warning("%s was built without a calibration: add one with  mta bank calibrate", out)
            remove_work(out)
            return True
        raise BankRefused(
            f"{out} holds a bank built from other people, another base, or other settings (dtype, …)",
            hint="Choose another folder with --out: the states of people need this bank.",
        )
    if other := sorted(path.name for path in out.glob("[!.]*") if path.name not in OURS):
        raise BankError(
            f"{out} holds {other[0]}, which does not belong to a bank",
            hint="Choose an empty or a new folder with --out.",
        )
    if (out / BEGUN).exists() and (out / BEGUN).read_text(encoding="utf-8") != keys.training:
        raise BankRefused(
            f"{out} holds an interrupted build from other people, another base, or other settings (dtype, …)",
            hint="Give the same again to resume it, or another folder with --out. To start over:  "
            f"rm -r {shlex.quote(str(out / 'work'))}",
        )
    return False
