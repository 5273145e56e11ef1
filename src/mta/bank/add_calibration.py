"""Calibrate a finished bank: measure, and write a calibrated copy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from mta.bank.calibration.calibrate import calibrate
from mta.bank.calibration.crossfit import ENOUGH
from mta.bank.calibration.people import calibration_people, measured_items
from mta.bank.card import write_described
from mta.bank.format import CALIBRATION, MEMBERS, BankInfo, check_base, check_new, file_hashes, read_adapters, read_info
from mta.bank.notes import forgotten_in, mark_stale, pass_stale_on
from mta.config import CalibrationSettings, Run
from mta.config.constants import ROUNDING_ONLY
from mta.config.loader import read_yaml, to_yaml
from mta.data.history import Person, named_items
from mta.distributed.executor import Executor
from mta.errors import InputError
from mta.model.base import BaseModel
from mta.system.atomic import copy_file, replacing_folder, write_tensors, write_text
from mta.system.progress import OnStep
from mta.tracking.run_folder import CONFIG


def calibrate_bank(
    folder: Path,
    base: BaseModel,
    people: Sequence[Person],
    run: Run,
    out: Path,
    *,
    executor: Executor | None = None,
    on_step: OnStep | None = None,
) -> None:
    """Write a calibrated copy of a finished bank to ``out``, measured on items behind neither anchors nor task LoRA.

    The copy has a new hash. Settings are those of ``run.calibration``.
    Raises InputError if too few people are left or the bank has no list of members, DataError for an item that is too
    long, BankError if ``out`` holds anything; BankCorrupt, BankMismatch.
    """
    info, gone = read_info(folder), forgotten_in(folder)  # those of the bank who are forgotten from now on stay marked
    known = [person for person in people if info.members.hash_of(person.id) not in gone]
    outside = _checked(folder, info, base, known, run.calibration)
    check_new(out)
    anchors, task_lora = read_adapters(folder, info)
    given = {name: getattr(run, name) for name in ROUNDING_ONLY}  # all else as the bank was built
    how, report = run.calibration.model_copy(update={"enabled": True}), on_step and partial(on_step, "calibration")
    settings = info.run.model_copy(update=given | {"calibration": how})
    calibration = calibrate(base, info.task, anchors, task_lora, outside, settings, executor=executor, on_step=report)
    if not calibration.info.gains:
        raise InputError(f"{folder} stays as it is: {calibration.info.notes[0]}", hint="Give more people.")
    with replacing_folder(out) as written:
        for name in info.files.keys() - {CALIBRATION}:
            copy_file(folder / name, written / name)
        pass_stale_on(folder, written, without="calibration" if forgotten_in(folder) <= gone else "")
        write_tensors(written / CALIBRATION, calibration.tensors(), {})
        changed = {
            "run": info.run.model_copy(update={"calibration": how}),
            "members": info.members.calibrated_on([person.id for person in outside]),
            "files": info.files | file_hashes(written, [CALIBRATION]),
            "calibration": calibration.info,
        }
        calibrated = info.model_copy(update=changed)
        if (folder / CONFIG).exists():  # the settings for another build like this
            new = calibrated.run.model_dump(mode="json", include={"calibration", "merge", "stack"})
            write_text(written / CONFIG, to_yaml(read_yaml(folder / CONFIG) | new))
        write_described(written, calibrated)
        for person in outside:  # who may have been behind another part of the bank
            if info.members.hash_of(person.id) in forgotten_in(folder) - gone:
                mark_stale(written, person.id)


def _checked(
    folder: Path, info: BankInfo, base: BaseModel, people: Sequence[Person], settings: CalibrationSettings
) -> list[Person]:
    """Return the people to calibrate a bank on, whose items fit."""
    check_base(folder, info, base.name, base.fingerprint)
    if info.members.hashed is None:
        raise InputError(
            f"{folder} has no {MEMBERS}, so its members are unknown",
            hint="Calibrate the bank where it was built, and publish it again.",
        )
    if settings.people < ENOUGH:
        raise InputError(f"calibration.people is {settings.people}; at least {ENOUGH} are needed", hint="Raise it.")
    unseen = {one.id: count for one in people if (count := info.unseen(one)) is not None}
    members = {one.id for one in people if info.members.trained(one.id, "anchor", "task LoRA")} - unseen.keys()
    outside = calibration_people(people, members, settings, info.run.seed, info.task, unseen)
    if len(outside) < ENOUGH:
        raise InputError(
            f"{len(people)} people are left, but all except {len(outside)} are in the bank, share their items with "
            f"others, or have fewer than two items; {ENOUGH} are needed",
            hint="Give other people, or the candidates it was built from, with the same first items.",
        )
    measured = {id(item) for parts in measured_items(outside, settings) for item in chain(*parts)}
    base.prompts.check(info.task, named_items(people, measured))
    return outside
