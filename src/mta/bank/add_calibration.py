"""Calibrate a finished bank: measure, then commit, so that a killed calibration leaves a bank that opens."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mta.bank.build import remove_work
from mta.bank.calibration.calibrate import calibrate
from mta.bank.calibration.crossfit import ENOUGH
from mta.bank.calibration.laplace import Calibration
from mta.bank.calibration.people import calibration_people, measured_items
from mta.bank.card import card
from mta.bank.format import (
    CALIBRATING,
    CALIBRATION,
    INFO,
    MEMBERS,
    UNKNOWN_TO_0_1_0,
    BankInfo,
    check_base,
    file_hashes,
    names_as_in_0_1_0,
    read_adapters,
    read_info,
    verify,
    with_hash,
    write_info,
)
from mta.bank.notes import clear_stale, pass_stale_on, stale, stops
from mta.config import CalibrationSettings, Run, StackSettings
from mta.config.constants import COMPUTED_WITH
from mta.config.loader import read_yaml, to_yaml
from mta.data.history import Person, named_items
from mta.data.tasks.task import Task
from mta.distributed.executor import Executor
from mta.errors import BankError, InputError
from mta.lora.peft import CARD
from mta.model.base import BaseModel
from mta.system.atomic import copy_file, json_sha256, replacing_folder, write_tensors, write_text
from mta.system.exclusive import exclusive
from mta.system.progress import OnStep, Step
from mta.tracking.run_folder import CONFIG
from mta.training.checkpoint import Checkpoint, saved_work


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
    their ids. ``since`` is what ``stops`` of the
    folders (the bank's, and ``out``) returned before the people were read; None: ask it now. An interrupted calibration
    resumes, and a finished one is not measured again. Raises InputError if too few people are left or the bank has no
    list of members, DataError for an item that is too long, BankError if a person is forgotten meanwhile or ``out``
    holds anything but an unfinished copy, BankCorrupt, BankMismatch.
    """
    _check_owners(read_info(folder), people, unrelated)
    folders = [folder, *([out] if out else [])]
    before = stops(*folders) if since is None else since

    def is_stopped() -> bool:
        return stops(*folders) != before

    if out:
        info, outside = _checked(folder, base, people, run.calibration)  # before anything is copied
        if _is_done(out, _work_of(info, base, outside, run)):
            return
        _copy(folder, out)
    target = out or folder
    with exclusive(target):
        info, outside = _checked(target, base, people, run.calibration)
        work = _work_of(info, base, outside, run)
        if _is_done(target, work):
            return
        _noted_settings(target)  # if they cannot be read, nothing is measured in vain
        write_text(target / CALIBRATING, work)
        found = _measured(target, info, base, outside, _settings(info, run), work, is_stopped, executor, on_step)
        _commit(target, info, outside, run.calibration, found, work, is_stopped)


def _settings(info: BankInfo, run: Run) -> Run:
    """Return the settings of the measurements: as the bank was built, except for the calibration and the machine."""
    given = {name: getattr(run, name) for name in COMPUTED_WITH}
    return info.run.model_copy(update=given | {"calibration": _enabled(run.calibration, True)})


def _enabled(settings: CalibrationSettings, enabled: bool) -> CalibrationSettings:
    return settings.model_copy(update={"enabled": enabled})


def _work_of(info: BankInfo, base: BaseModel, people: Sequence[Person], run: Run) -> str:
    """Return the key of a calibration: of what was trained, the people, and the settings that count."""
    trained = _without_calibration(info).files
    histories = [[one.id, one.digest()] for one in people]
    unused = {"base", "encoder", *COMPUTED_WITH}  # the bank has fingerprints of the first two
    loaded = base.as_loaded(_with_todays_defaults(_settings(info, run))).model_dump(mode="json", exclude=unused)
    return json_sha256([trained, histories, loaded])


def _is_done(folder: Path, work: str) -> bool:
    """Return whether a bank has the calibration with this key, which nobody behind it asked to be forgotten."""
    if not (folder / INFO).exists() or not read_info(folder).calibration or "calibration" in stale(folder):
        return False
    return saved_work(folder / CALIBRATION) == work


def _checked(
    folder: Path, base: BaseModel, people: Sequence[Person], settings: CalibrationSettings
) -> tuple[BankInfo, list[Person]]:
    """Return a bank's description, and the people to calibrate it on, whose items fit."""
    info = read_info(folder)
    check_base(folder, info, base.name, base.fingerprint)
    outside = _outside(folder, info, people, settings)
    measured = {id(item) for parts in measured_items(outside, settings) for item in chain(*parts)}
    base.prompts.check(Task.model_validate(info.task), named_items(people, measured))
    return info, outside


def _copy(folder: Path, out: Path) -> None:
    """Copy a bank to a new folder, or go on with the copy that an interrupted call left there.

    Notes on runs and publications are left out: these were about the other folder. Raises BankError if ``out`` holds
    anything else, BankCorrupt.
    """
    info = read_info(folder)
    if not (out / INFO).exists():
        if out.exists() and any(out.iterdir()):
            raise BankError(f"{out} is not empty, and no copy of {folder}", hint="Give a new folder:  --out bank-2/")
        _copy_files(folder, info, out)
    elif out.samefile(folder) or not _is_unfinished(read_info(out), out, info):
        hint = f"Give a new folder. To calibrate that bank again:  mta bank calibrate {shlex.quote(str(out))}"
        raise BankError(f"{out} is a bank already, and no unfinished copy of {folder}", hint=hint)
    pass_stale_on(folder, out)


def _copy_files(folder: Path, info: BankInfo, out: Path) -> None:
    with replacing_folder(out) as temporary:
        for name in (*info.files, CARD, INFO, CONFIG):
            if (folder / name).exists():
                copy_file(folder / name, temporary / name)
        if info.members.hashed:  # which a killed process may have left in another file
            write_text(temporary / MEMBERS, info.members.hashed.to_bytes().decode())
        verify(temporary, read_info(temporary))  # another process may have calibrated the bank meanwhile


def _is_unfinished(info: BankInfo, out: Path, source: BankInfo) -> bool:
    """Return whether a bank in ``out`` is a copy whose calibration was interrupted, or did not begin."""
    trained = _without_calibration(source)
    hashes = source.hash, trained.hash  # the second where a person was forgotten at its end
    same = _without_calibration(info).files == trained.files
    return same and (info.hash in hashes or (out / CALIBRATING).exists())


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
    work: str,
    is_stopped: Callable[[], bool],
    executor: Executor | None,
    on_step: OnStep | None,
) -> Calibration:
    anchors, task_lora = read_adapters(folder, info)

    def stepped(step: Step) -> None:
        _check_not_stopped(folder, is_stopped)
        if on_step:
            on_step("calibration", step)

    def saved(name: str) -> Checkpoint:
        file = folder / "work" / f"{name}.safetensors"
        return Checkpoint(file, work, allowed=lambda: not is_stopped())  # no new file after `forget`

    found = calibrate(
        base,
        Task.model_validate(info.task),
        anchors,
        task_lora,
        people,
        settings,
        executor=executor,
        checkpoint=saved,
        on_step=stepped,
    )
    if not found.info.gains:
        remove_work(folder)
        raise InputError(f"{folder} stays as it is: {found.info.notes[0]}", hint="Give more people.")
    return found


def _commit(
    folder: Path,
    info: BankInfo,
    people: Sequence[Person],
    settings: CalibrationSettings,
    found: Calibration,
    work: str,
    is_stopped: Callable[[], bool],
) -> None:
    """Write a calibration, with the key ``work``.

    A person may be forgotten at any time before its end, and it then has to be given up.
    """
    without, noted = _without_calibration(info), _noted_settings(folder)
    _check_not_stopped(folder, is_stopped)
    if info.calibration:  # if this is killed, what is left is a bank without a calibration
        write_info(folder, without)
    write_tensors(folder / CALIBRATION, found.tensors(), {"work": work})
    run = info.run.model_copy(update={"calibration": _enabled(settings, True)})
    changed = {
        "run": _with_todays_defaults(run),
        "members": info.members.calibrated_on([person.id for person in people]),
        "files": info.files | file_hashes(folder, [CALIBRATION]),
        "calibration": found.info,
    }
    whole = with_hash(info.model_copy(update=changed))
    write_text(folder / CARD, card(whole))
    if noted is not None:
        new = whole.run.model_dump(mode="json", include={"calibration", "merge", "stack"})
        write_text(folder / CONFIG, to_yaml(noted | new))
    clear_stale(folder, "calibration")  # before people of the new one are members, who may be forgotten at once
    write_info(folder, whole)
    try:
        _check_not_stopped(folder, is_stopped)  # from here on, forgetting finds the person in the bank
    except BankError:
        write_info(folder, without)
        write_text(folder / CARD, card(without))
        (folder / CALIBRATION).unlink()
        clear_stale(folder, "calibration")  # set meanwhile: nothing of the person is left in this part
        raise
    remove_work(folder)


def _noted_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings in ``config.yaml``, which follow a calibration, for another build like this; None without."""
    return read_yaml(folder / CONFIG) if (folder / CONFIG).exists() else None


def _without_calibration(info: BankInfo) -> BankInfo:
    files = {name: digest for name, digest in info.files.items() if name != CALIBRATION}
    run = info.run.model_copy(update={"calibration": _enabled(info.run.calibration, False)})
    changed = {"calibration": None, "files": files, "members": info.members.calibrated_on([]), "run": run}
    return with_hash(info.model_copy(update=changed))


def _check_not_stopped(folder: Path, is_stopped: Callable[[], bool]) -> None:
    if is_stopped():
        remove_work(folder)
        raise BankError("a person was forgotten during the calibration", hint="Leave them out, and calibrate again.")


def _with_todays_defaults(run: Run) -> Run:
    """Return a bank's settings, in which default policy and stack of 0.1.0 become today's, which are calibrated."""
    if names_as_in_0_1_0(run.task_lora) != UNKNOWN_TO_0_1_0.keys() or run.stack.calibrated:
        return run
    policy = "auto" if run.merge.policy == "posterior" else run.merge.policy
    calibrated = run.stack.training == StackSettings().training
    merge, stack = ({"policy": policy}, {"calibrated": calibrated})
    update = {"merge": run.merge.model_copy(update=merge), "stack": run.stack.model_copy(update=stack)}
    return run.model_copy(update=update)
