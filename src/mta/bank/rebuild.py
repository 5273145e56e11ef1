"""Train the LoRAs of groups anew without the people who asked to be forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from mta.bank.card import write_described
from mta.bank.context import plan_loras
from mta.bank.format import ANCHORS, INDEX, BankInfo, check_base, check_new, file_hashes, read_adapters, read_info
from mta.bank.groups import items_of
from mta.bank.notes import forgotten_in, pass_stale_on
from mta.bank.worker import BankWorker, LoraPiece, train_piece
from mta.config import Run
from mta.config.constants import ROUNDING_ONLY
from mta.data.earlier import as_shown
from mta.data.history import Person, check_distinct
from mta.distributed.executor import Executor, LocalExecutor
from mta.errors import BankError, InputError
from mta.lora.batch import LoraBatch, concatenate
from mta.model.base import BaseModel
from mta.model.encoders import Encoder, encode_people
from mta.system.atomic import copy_file, replacing_folder, write_tensors
from mta.system.progress import OnStep
from mta.tracking.run_folder import CONFIG
from mta.training.trainer import Job


def rebuild_groups(
    folder: Path,
    base: BaseModel,
    people: Sequence[Person],
    encoder: Encoder,
    out: Path,
    run: Run,
    *,
    executor: Executor | None = None,
    on_step: OnStep | None = None,
) -> None:
    """Write a copy of a bank to ``out`` whose marked groups are trained anew; other groups do not change.

    A group is marked if one of its people asked to be forgotten. ``people`` hold all others of these groups. A group
    without anybody left changes nothing any more: its LoRA is zero. The calibration is the bank's, and says so. Of
    ``run``, only what does not change results counts: memory, device.
    Raises InputError if no group is marked or a person is missing, BankError, BankCorrupt, BankMismatch.
    """
    info = read_info(folder)
    check_base(folder, info, base.name, base.fingerprint)
    check_new(out)
    gone = forgotten_in(folder)  # people who are forgotten from now on stay marked
    groups, task = _marked(folder, info, people, gone), info.task
    anchors, task_lora = read_adapters(folder, info)
    items = {n: items_of(group, info.run) for n, group in groups.items()}
    shown = {n: as_shown(task, groups[n], own, info.run.task_lora.history) for n, own in items.items()}
    jobs = [
        Job(f"group-{n}", list(chain(*base.prompts.all(task, own.items))), blocks=own.blocks)
        for n, own in shown.items()
        if own.items
    ]
    settings = info.run.model_copy(update={name: getattr(run, name) for name in ROUNDING_ONLY})
    worker = BankWorker(base, settings, task_lora and task_lora.to(base.device), on_step=on_step)
    loras = _trained(worker, jobs, executor or LocalExecutor())
    with replacing_folder(out) as written:
        for name in info.files.keys() - {ANCHORS, INDEX}:
            copy_file(folder / name, written / name)
        if (folder / CONFIG).exists():
            copy_file(folder / CONFIG, written / CONFIG)
        pass_stale_on(folder, written, without="anchor" if forgotten_in(folder) <= gone else "")
        each = [
            loras.get(n, anchors.select([n]).map(torch.zeros_like if n in groups else torch.clone))
            for n in range(len(anchors))
        ]
        write_tensors(written / ANCHORS, concatenate(each).tensors(), {"scale": repr(anchors.scale)})
        vectors = load_file(folder / INDEX)["vectors"]
        for n, group in groups.items():
            found = encode_people(encoder, task, group, info.run.bank.encode) if group else vectors[:0]
            vectors[n] = normalize(found.sum(0), dim=0)
        write_tensors(written / INDEX, {"vectors": vectors})
        note = f"measured before {len(groups)} of {len(anchors)} groups were trained anew"
        known = info.calibration and info.calibration.model_copy(update={"notes": (*info.calibration.notes, note)})
        changed = {
            "items": tuple(len(items[n]) if n in groups else count for n, count in enumerate(info.items)),
            "people": tuple(len(groups[n]) if n in groups else count for n, count in enumerate(info.people)),
            "members": info.members.without(gone),
            "files": info.files | file_hashes(written, [ANCHORS, INDEX]),
            "calibration": known,
        }
        write_described(written, info.model_copy(update=changed))


def _marked(folder: Path, info: BankInfo, people: Sequence[Person], gone: set[str]) -> dict[int, list[Person]]:
    """Return the people who are left of each marked group, by its number. Raises InputError."""
    check_distinct(people)
    members = info.members
    if members.hashed is None:
        raise InputError(f"{folder} has no list of its members", hint="Rebuild the bank where it was built.")
    left = {n: set(own) - gone for n, own in enumerate(members.hashed.anchors) if gone & set(own)}
    if not left:
        raise InputError(f"no group of {folder} is marked", hint="mta forget marks the groups of a person.")
    known = {members.hash_of(person.id): person for person in people}
    if missing := sum(len(own - known.keys()) for own in left.values()):
        raise InputError(
            f"{missing} people of the marked groups are not given", hint="Give the file that the bank was built from."
        )
    return {n: sorted((known[one] for one in own), key=lambda person: person.id) for n, own in left.items()}


def _trained(worker: BankWorker, jobs: Sequence[Job], executor: Executor) -> dict[int, LoraBatch]:
    """Return the LoRAs of the groups, by number."""
    run, frozen = worker.run, worker.run.task_lora.lora if worker.task_lora else None
    plan = plan_loras(worker.base, jobs, run, run.bank.lora, frozen, executor)
    cohorts = [tuple(jobs[n] for n in cohort) for cohort in plan.cohorts]
    pieces = [LoraPiece(f"groups-{n}", "anchors", own, plan.tokens_per_batch) for n, own in enumerate(cohorts)]
    loras = dict[int, LoraBatch]()
    for outcome in executor.run(train_piece, pieces, worker) if pieces else ():
        if outcome.result is None:
            raise BankError(f"the groups cannot be trained: {outcome.error}", hint="Fix this, and try again.")
        loras |= {
            int(job.key.removeprefix("group-")): outcome.result.select([row])
            for row, job in enumerate(outcome.piece.jobs)
        }
    return loras
