"""Calibrate a finished bank: measure, write the calibrated bank beside it, and rename it when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from mta.bank.build import remove_work
from mta.bank.calibration.calibrate import calibrate
from mta.bank.calibration.crossfit import ENOUGH
from mta.bank.calibration.laplace import Calibration
from mta.bank.calibration.people import calibration_people, measured_items
from mta.bank.card import write_described
from mta.bank.format import (
    CALIBRATION,
    MEMBERS,
    PUBLISHED,
    REPLACED,
    STALE,
    STOPS,
    BankInfo,
    check_base,
    check_new,
    file_hashes,
    read_adapters,
    read_info,
)
from mta.bank.notes import forget_marker, note_stop, pass_stale_on, remove_leftovers
from mta.config import CalibrationSettings, Run
from mta.config.constants import ROUNDING_ONLY
from mta.config.loader import read_yaml, to_yaml
from mta.data.history import Person, named_items
from mta.data.tasks.task import Task
from mta.distributed.executor import Executor
from mta.errors import BankError, InputError
from mta.model.base import BaseModel
from mta.system.atomic import (
    copy_file,
    exclusive,
    make_folder,
    replacing_folder,
    sync_folder,
    write_tensors,
    write_text,
)
from mta.system.progress import OnStep, Step
from mta.tracking.run_folder import CONFIG

_OUT = "Calibrate a copy:  --out bank-2/"


def calibrate_bank(
    folder: Path,
    base: BaseModel,
    people: Sequence[Person],
    run: Run,
    *,
    out: Path | None = None,
    unrelated: bool = False,
    since: str | None = None,
    executor: Executor | None = None,
    on_step: OnStep | None = None,
) -> None:
    """Calibrate a finished bank, or its copy in ``out``, on items behind neither its anchors nor its task LoRA.

    The calibrated bank has a new hash. Settings are those of ``run.calibration``. ``unrelated`` confirms that none of
    the people is behind an imported LoRA; otherwise, the people behind all LoRAs must be among them, to be left out by
    their ids. ``since`` is what ``forget_marker(folder)`` returned before the people were read; None: ask it now.
    Raises InputError if too few people are left or the bank has no list of members, DataError for an item that is too
    long, BankError if a person is forgotten meanwhile, ``out`` holds anything, or the bank cannot be replaced;
    BankCorrupt, BankMismatch.
    """
    folder = folder.resolve()
    before = forget_marker(folder) if since is None else since
    _check_owners(read_info(folder), people, unrelated)

    def check(bank: Path = folder) -> None:
        if forget_marker(bank) != before:
            raise BankError(
                "a person was forgotten during the calibration", hint="Leave them out, and calibrate again."
            )

    def stepped(step: Step) -> None:
        check()
        if on_step:
            on_step("calibration", step)

    with nullcontext() if out else _held(folder):
        info = read_info(folder)
        outside = _checked(folder, info, base, people, run.calibration)
        if out:
            check_new(out)
        noted = (
            read_yaml(folder / CONFIG) if (folder / CONFIG).exists() else None
        )  # before measuring: it may be damaged
        calibration = _measured(folder, info, base, outside, _settings(info, run), executor, stepped)
        publish = partial(_appear if out else _replace, check=check)
        try:
            with replacing_folder(out or folder, publish) as written:
                _copy(folder, written, info, whole=not out)
                _write(written, info, outside, run.calibration, calibration, noted)
                check()
        except OSError:
            check()  # forgetting a person removes an unfinished folder
            raise


def _settings(info: BankInfo, run: Run) -> Run:
    """Return the settings of the measurements: as the bank was built, except for the calibration and the machine."""
    given = {name: getattr(run, name) for name in ROUNDING_ONLY}
    return info.run.model_copy(update=given | {"calibration": _enabled(run.calibration)})


def _enabled(settings: CalibrationSettings) -> CalibrationSettings:
    return settings.model_copy(update={"enabled": True})


def _trained_files(info: BankInfo) -> dict[str, str]:
    """Return the hashes of the files that a calibration does not change."""
    return {name: digest for name, digest in info.files.items() if name != CALIBRATION}


def _checked(
    folder: Path, info: BankInfo, base: BaseModel, people: Sequence[Person], settings: CalibrationSettings
) -> list[Person]:
    """Return the people to calibrate a bank on, whose items fit."""
    check_base(folder, info, base.name, base.fingerprint)
    outside = _outside(folder, info, people, settings)
    measured = {id(item) for parts in measured_items(outside, settings) for item in chain(*parts)}
    base.prompts.check(Task.model_validate(info.task), named_items(people, measured))
    return outside


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the lock of a bank that is to be replaced. Raises BankError if it cannot be, InputError if it is locked."""
    closed = [str(place) for place in (folder, folder.parent) if not os.access(place, os.W_OK)]
    if folder.is_mount() or closed:
        why = f"{closed[0]} is not writable" if closed else "it is a mount point"
        raise BankError(f"{folder} cannot be replaced by the calibrated bank: {why}", hint=_OUT)
    with exclusive(folder):
        remove_leftovers(folder)
        yield


def _check_owners(info: BankInfo, people: Sequence[Person], unrelated: bool) -> None:
    """Raise InputError if people behind imported LoRAs may be among the given ones, under other ids than the names."""
    if info.plan or unrelated or info.members.hashed is None:
        return
    anchors = info.members.anchors
    if unnamed := anchors - sum(info.members.trained(person.id, "anchor") for person in people):
        raise InputError(
            f"{unnamed} of {anchors} imported LoRAs have the name of none of the {len(people)} given people, who may "
            "thus be behind these LoRAs",
            hint="Import the LoRAs from folders that are called like their people, and give these people, too. Or "
            "confirm that none of the given people is behind a LoRA of another name:  --unrelated",
        )


def _outside(folder: Path, info: BankInfo, people: Sequence[Person], settings: CalibrationSettings) -> list[Person]:
    if info.members.hashed is None:
        raise InputError(
            f"{folder} has no {MEMBERS}, so its members are unknown",
            hint="Calibrate the bank where it was built, and publish it again.",
        )
    unseen = {one.id: count for one in people if (count := info.unseen(one)) is not None}
    behind = {one.id for one in people if info.members.trained(one.id, "anchor", "task LoRA")}
    members = behind - unseen.keys()
    if settings.people < ENOUGH:
        raise InputError(f"calibration.people is {settings.people}; at least {ENOUGH} are needed", hint="Raise it.")
    outside = calibration_people(people, members, settings, info.run.seed, Task.model_validate(info.task), unseen)
    if len(outside) < ENOUGH:
        raise InputError(
            f"{len(people)} people are given, but all except {len(outside)} are in the bank, share their items with "
            f"others, or have fewer than two items; {ENOUGH} are needed",
            hint="Give other people, or the candidates it was built from, with the same first items.",
        )
    return outside


def _measured(
    folder: Path,
    info: BankInfo,
    base: BaseModel,
    people: Sequence[Person],
    settings: Run,
    executor: Executor | None,
    on_step: Callable[[Step], None],
) -> Calibration:
    anchors, task_lora = read_adapters(folder, info)
    task = Task.model_validate(info.task)
    calibration = calibrate(base, task, anchors, task_lora, people, settings, executor=executor, on_step=on_step)
    if not calibration.info.gains:
        raise InputError(f"{folder} stays as it is: {calibration.info.notes[0]}", hint="Give more people.")
    return calibration


def _copy(folder: Path, written: Path, info: BankInfo, whole: bool) -> None:
    """Copy what a calibration does not change: the trained files or, for the ``whole`` folder, all files.

    Without the whole folder, notes on runs and publications are left out: these were about the other folder.
    """
    make_folder(written)
    if whole:
        remove_work(folder)
        rewritten = {".lock", STALE, STOPS}  # other processes write the last two
        shutil.copytree(
            folder,
            written,
            ignore=lambda place, names: rewritten & {*names} if Path(place) == folder else (),
            copy_function=lambda source, target: copy_file(Path(source), Path(target)),
            dirs_exist_ok=True,
        )
        if forget_marker(folder):
            note_stop(written)
    else:
        for name in _trained_files(info):
            copy_file(folder / name, written / name)
    pass_stale_on(folder, written, without="calibration")


def _write(
    written: Path,
    info: BankInfo,
    people: Sequence[Person],
    settings: CalibrationSettings,
    calibration: Calibration,
    noted: dict[str, Any] | None,
) -> None:
    """Write a calibration and what changes with it: description, members, card, settings."""
    write_tensors(written / CALIBRATION, calibration.tensors(), {})
    changed = {
        "run": info.run.model_copy(update={"calibration": _enabled(settings)}),
        "members": info.members.calibrated_on([person.id for person in people]),
        "files": info.files | file_hashes(written, [CALIBRATION]),
        "calibration": calibration.info,
    }
    calibrated = info.model_copy(update=changed)
    if noted is not None:  # the settings for another build like this
        new = calibrated.run.model_dump(mode="json", include={"calibration", "merge", "stack"})
        write_text(written / CONFIG, to_yaml(noted | new))
    write_described(written, calibrated)


def _appear(written: Path, out: Path, check: Callable[[], None]) -> None:
    """Rename a complete copy to ``out``, and back if a person was forgotten meanwhile."""
    written.rename(out)
    try:
        check()
    except BankError:
        out.rename(written)
        raise


def _replace(written: Path, folder: Path, check: Callable[[Path], None]) -> None:
    """Rename a bank's folder away, and the calibrated bank into its place.

    While the place is empty, nothing can be noted in either folder: a person who was forgotten before is noted in the
    old one, and whoever forgets a person later finds the members of the new one.
    """
    old = folder.with_name(REPLACED.format(folder.name))
    folder.rename(old)
    try:
        check(old)
        if (old / PUBLISHED).exists():  # perhaps written after the files were copied
            copy_file(old / PUBLISHED, written / PUBLISHED)
        written.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
