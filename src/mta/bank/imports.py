"""Make a bank of LoRAs that exist already, or add LoRAs to a bank. Source: our choice."""

from __future__ import annotations

import logging
import secrets
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mta.bank.card import card
from mta.bank.format import (
    ANCHORS,
    INDEX,
    SCHEMA,
    TASK_LORA,
    BankInfo,
    Members,
    check_base,
    file_hashes,
    named,
    read_adapters,
    read_info,
    stale,
    write_info,
)
from mta.config import Lora, Run
from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.errors import BankError, InputError
from mta.lora.batch import Factors, LoraBatch, stack
from mta.lora.peft import CARD, CONFIG, WEIGHTS, alpha_of, read_peft
from mta.model.base import BaseModel
from mta.model.encoders import Encoder, encode_people
from mta.system.atomic import copy_file, sync_folder, write_tensors, write_text
from mta.tracking.run_folder import work_of

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
    the LoRAs. ``people`` with these ids are what they were trained on; without them the bank retrieves nobody by
    content. The bank has neither a task LoRA nor a calibration. Raises InputError, BankError.
    """
    _refuse_existing(out)
    adapters = sorted(map(Path.absolute, adapters), key=lambda folder: folder.name)
    parts, owners, ids = _read(adapters, base), _owners(adapters, people), [folder.name for folder in adapters]
    files = [file_hashes(folder, [CONFIG, WEIGHTS]) for folder in adapters]
    work = work_of(base.fingerprint, encoder.fingerprint, task.identity, files)
    settings = run.model_copy(
        update={
            "task": task.name,
            "encoder": encoder.name,
            "task_lora": run.task_lora.model_copy(update={"enabled": False}),
            "calibration": run.calibration.model_copy(update={"enabled": False}),
        }
    )
    info = BankInfo(
        version=SCHEMA,
        base=base.name,
        base_fingerprint=base.fingerprint,
        base_note=base.note,
        task=task.model_dump(mode="json"),
        encoder=encoder.name,
        encoder_fingerprint=encoder.fingerprint,
        run=base.as_loaded(settings),
        work=work,
        plan="",
        items=tuple(len(owner.items) if owner else 0 for owner in owners),
        cut={},
        seconds={},
        members=Members.of(secrets.token_hex(32), [], ids, ids),
        files={},
        hash="",
    )
    _write(out, info, stack(parts), _vectors(encoder, task, owners, run))


def add_to_bank(
    folder: Path, adapters: Sequence[Path], base: BaseModel, encoder: Encoder, out: Path, people: Sequence[Person] = ()
) -> None:
    """Write a new bank with a bank's anchors and the LoRAs of PEFT folders, which were trained over its task LoRA.

    Arguments are as for ``import_bank``. The new bank has no calibration. Raises InputError, BankError, BankMismatch.
    """
    _refuse_existing(out)
    info = read_info(folder)
    check_base(folder, info, base.name, base.fingerprint)
    if info.members.hashed is None:
        raise InputError(f"{folder} came without its members", hint="Add to the bank where it was built.")
    if parts := stale(folder):
        raise BankError(f"a forgotten person is in its {' and '.join(parts)}: {folder}", hint="Rebuild the bank first.")
    adapters = sorted(map(Path.absolute, adapters), key=lambda adapter: adapter.name)
    more, owners, ids = _read(adapters, base), _owners(adapters, people), [adapter.name for adapter in adapters]
    if known := [id for id in ids if "anchor" in info.members.artefacts_of(id)]:
        raise InputError(f"{known[0]!r} is an anchor of {folder} already", hint="Leave that folder out.")
    anchors, _ = read_adapters(folder, info)
    vectors = _vectors(encoder, Task.model_validate(info.task), owners, info.run)
    files = [file_hashes(adapter, [CONFIG, WEIGHTS]) for adapter in adapters]
    changed = {
        "work": work_of(info.hash, files),
        "items": (*info.items, *(len(owner.items) if owner else 0 for owner in owners)),
        "members": info.members.joined_by(ids),
        "plan": "",
        "cut": {},
        "seconds": {},
        "run": info.run.model_copy(update={"calibration": info.run.calibration.model_copy(update={"enabled": False})}),
        "calibration": None,
    }
    before = load_file(folder / INDEX)["vectors"]
    pooled = folder / TASK_LORA if info.run.task_lora.enabled else None
    _write(out, info.model_copy(update=changed), stack([anchors, *more]), torch.cat([before, vectors]), pooled)


def _refuse_existing(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BankError(f"{out} exists already", hint="Choose an empty or a new folder with --out.")


def _read(adapters: Sequence[Path], base: BaseModel) -> list[LoraBatch]:
    """Return the LoRAs with all layers of the base; a layer that a LoRA does not change is zero."""
    if not adapters:
        raise InputError("no adapters were given", hint="Give folders that hold adapter_config.json.")
    names = [folder.name for folder in adapters]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(
            f"two folders are called {min(twice)!r}; a folder's name is the id of its person",
            hint="Rename one of them.",
        )
    return [_of_base(folder, read_peft(folder), base) for folder in adapters]


def _of_base(folder: Path, lora: LoraBatch, base: BaseModel) -> LoraBatch:
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
    found = LoraBatch(factors, lora.scale)
    return found if lora.scale > 0 else found.scaled_into_b()  # a bank's alpha is positive


def _owners(adapters: Sequence[Path], people: Sequence[Person]) -> list[Person | None]:
    known = {person.id: person for person in people if person.items}
    if missing := [folder.name for folder in adapters if people and folder.name not in known]:
        log.warning("no items are given for %s: no person is near to them by content", ", ".join(missing))
    return [known.get(folder.name) for folder in adapters]


def _vectors(encoder: Encoder, task: Task, owners: Sequence[Person | None], run: Run) -> Tensor:
    """Return a vector for each owner, (N, E); zero where the items are not known."""
    known = [n for n, owner in enumerate(owners) if owner]
    if not known:
        return torch.zeros(len(owners), encoder.encode(["."]).shape[1])
    found = encode_people(encoder, task, [owner for owner in owners if owner], run.bank.encode)
    vectors = found.new_zeros(len(owners), found.shape[1])
    vectors[known] = found
    return vectors


def _write(out: Path, info: BankInfo, anchors: LoraBatch, vectors: Tensor, task_lora: Path | None = None) -> None:
    """Write the files of a bank beside ``out``, and rename the folder when it is complete."""
    lora = Lora(rank=anchors.rank, alpha=alpha_of(anchors.scale, anchors.rank))
    bank = info.run.bank.model_copy(update={"anchors": len(anchors), "lora": lora})
    aside = out.absolute().with_name(f".{out.absolute().name}.{uuid.uuid4().hex}")
    try:
        write_tensors(aside / ANCHORS, anchors.tensors(), {"scale": repr(anchors.scale)})
        write_tensors(aside / INDEX, {"vectors": vectors.contiguous()})
        for file in sorted(task_lora.iterdir()) if task_lora else ():
            copy_file(file, aside / TASK_LORA / file.name)
        names = sorted(str(file.relative_to(aside)) for file in aside.rglob("*") if file.is_file())
        changed = {"run": info.run.model_copy(update={"bank": bank}), "files": file_hashes(aside, names), "hash": ""}
        whole = named(info.model_copy(update=changed))
        write_text(aside / CARD, card(whole))
        write_info(aside, whole)
        aside.rename(out)  # in place of an empty folder, if there is one
        sync_folder(out.absolute().parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
