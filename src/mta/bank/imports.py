"""Make a bank of LoRAs that exist already. Source: our choice."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mta.bank.card import write_described
from mta.bank.format import ANCHORS, INDEX, BankInfo, check_new, file_hashes
from mta.bank.members import Members
from mta.config import Lora, Run
from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.errors import InputError
from mta.lora.batch import Factors, LoraBatch, concatenate
from mta.lora.peft import CONFIG, WEIGHTS, alpha_of, is_whole, read_peft
from mta.model.base import BaseModel
from mta.model.encoders import Encoder, encode_people
from mta.system.atomic import json_sha256, replacing_folder, write_tensors

log = logging.getLogger("mta")


def import_bank(
    adapters: Sequence[Path],
    base: BaseModel,
    task: Task,
    encoder: Encoder,
    out: Path,
    run: Run,
    people: Sequence[Person] = (),
) -> None:
    """Write a bank whose anchors are the LoRAs of PEFT folders; a folder's name is the id of its person.

    The LoRAs may have different ranks, scales, and layers: they are zero-padded, and the merge of a bank equals that of
    the LoRAs. ``people`` with these ids are what they were trained on; without them anchors are not
    retrieved by content. The bank has neither a task LoRA nor a calibration. Raises InputError, BankError.
    """
    check_new(out)
    folders = sorted(map(Path.absolute, adapters), key=lambda folder: folder.name)
    loras, ids = _read(folders, base), [folder.name for folder in folders]
    known = {person.id: person for person in people if person.items}
    owners = [known.get(name) for name in ids]
    if people and (missing := owners.count(None)):
        log.warning("no items are given for %d of %d LoRAs: these cannot be retrieved by content", missing, len(ids))
    files = [file_hashes(folder, [CONFIG, WEIGHTS]) for folder in folders]
    anchors = concatenate(loras)
    changed = {
        "task": task.name,
        "encoder": encoder.name,
        "bank": run.bank.model_copy(
            update={
                "anchors": len(anchors),
                "lora": Lora(rank=anchors.rank, alpha=alpha_of(anchors.scale, anchors.rank)),
            }
        ),
        "task_lora": run.task_lora.model_copy(update={"enabled": False}),
        "calibration": run.calibration.model_copy(update={"enabled": False}),
    }
    loaded, vectors = base.as_loaded(run.model_copy(update=changed)), _vectors(encoder, task, owners, run)
    with replacing_folder(out) as temporary:
        write_tensors(temporary / ANCHORS, anchors.tensors(), {"scale": repr(anchors.scale)})
        write_tensors(temporary / INDEX, {"vectors": vectors.contiguous()})
        info = BankInfo(
            base=base.name,
            base_fingerprint=base.fingerprint,
            base_note=base.note,
            task=task.model_dump(mode="json"),
            encoder=loaded.encoder,
            encoder_fingerprint=encoder.fingerprint,
            run=loaded,
            work=json_sha256([base.fingerprint, encoder.fingerprint, task.identity, files]),
            items=tuple(len(owner.items) if owner else 0 for owner in owners),
            members=Members.of(secrets.token_hex(32), [], ids, [[id] for id in ids]),
            files=file_hashes(temporary, [ANCHORS, INDEX]),
        )
        write_described(temporary, info)


def _read(folders: Sequence[Path], base: BaseModel) -> list[LoraBatch]:
    """Return the LoRAs of the folders, each with all layers of the base. Raises InputError."""
    if not folders:
        raise InputError("no adapters were given", hint="Give folders that hold adapter_config.json.")
    ids = [folder.name for folder in folders]
    if twice := {name for name in ids if ids.count(name) > 1}:
        raise InputError(
            f"two folders are called {min(twice)!r}; a folder's name is the id of its person",
            hint="Rename one of them.",
        )
    loras = [_of_base(folder, read_peft(folder), base) for folder in folders]
    if whole := [folder for folder in folders if is_whole(folder)]:
        raise InputError(
            f"{whole[0]} is an export of mta: a person's task LoRA, merge, and stack in one. A merge of several would "
            "count the task LoRA as often",
            hint="Give LoRAs that were trained apart, or build a bank from people's items:  mta bank build --help",
        )
    return loras


def _of_base(folder: Path, lora: LoraBatch, base: BaseModel) -> LoraBatch:
    """Return the LoRA with all layers of the base; a layer that it does not change is zero. Raises InputError."""
    for name, shape in lora.shapes.items():
        if base.targets.get(name) != shape:
            has = base.targets.get(name, "no such layer")
            raise InputError(
                f"{folder} changes layer {name!r} of {shape[0]} inputs and {shape[1]} outputs; {base.name} has {has}",
                hint="Give LoRAs that were trained on this base, or the base that they were trained on (--base).",
            )
    some = next(iter(lora.factors.values())).a
    factors = {
        name: lora.factors.get(name) or Factors(some.new_zeros(1, lora.rank, d), some.new_zeros(1, o, lora.rank))
        for name, (d, o) in base.targets.items()
    }
    whole = LoraBatch(factors, lora.scale)
    return whole if lora.scale > 0 else whole.scaled_into_b()  # a bank's alpha is positive


def _vectors(encoder: Encoder, task: Task, owners: Sequence[Person | None], run: Run) -> Tensor:
    """Return a vector for each owner, (N, E); zero where the items are not known."""
    known = [n for n, owner in enumerate(owners) if owner]
    if not known:
        return torch.zeros(len(owners), encoder.encode(["."]).shape[1])
    encoded = encode_people(encoder, task, [owner for owner in owners if owner], run.bank.encode)
    vectors = encoded.new_zeros(len(owners), encoded.shape[1])
    vectors[known] = encoded
    return vectors
