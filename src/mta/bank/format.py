"""The files of a bank's folder: names, schema of ``bank.json``, reading, writing, and checks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file

from mta.bank.calibration.info import CalibrationInfo
from mta.bank.calibration.laplace import Calibration
from mta.bank.members import MemberHashes, Members
from mta.config import Run
from mta.data.history import Person
from mta.data.tasks.task import UNTRAINED, Task
from mta.errors import BankCorrupt, BankError, BankMismatch, BankNotFound
from mta.lora.batch import LoraBatch
from mta.lora.peft import CARD, CONFIG, WEIGHTS, read_peft
from mta.system.assets import cache_dir
from mta.system.atomic import file_sha256, read_json, write_json, write_text
from mta.tracking import run_folder

SCHEMA = 5
INFO = "bank.json"
MEMBERS = "members.json"
ANCHORS = "anchors.safetensors"
INDEX = "index.safetensors"
CALIBRATION = "calibration.safetensors"
TASK_LORA = "task_lora"
STALE = "needs-rebuild.json"
PUBLISHED = "published.json"
TASK_LORA_CONFIG = f"{TASK_LORA}/{CONFIG}"
# The files whose hashes bank.json holds.
HASHED_FILES = ANCHORS, INDEX, CALIBRATION, TASK_LORA_CONFIG, f"{TASK_LORA}/{WEIGHTS}"
_FILES = {INFO, MEMBERS, ANCHORS, INDEX, CALIBRATION, TASK_LORA, STALE, PUBLISHED, CARD, "work"}
OURS = _FILES | run_folder.NAMES
PERMISSIONS = "Make the folder writable, or use a host where it is, and repeat the command."


def restore(folder: Path) -> str:
    """Return the hint for a damaged bank. Building into its folder would take the bank for finished."""
    remove = f"rm -r {shlex.quote(str(folder))}"
    return f"Copy the bank again from its source. Or remove it, and repeat the command that built it:  {remove}"


def check_new(out: Path) -> None:
    """Raise BankError for the folder of a new bank that holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BankError(f"{out} exists already", hint="Choose an empty or a new folder with --out.")


class BankInfo(BaseModel, frozen=True, extra="forbid"):
    """The contents of ``bank.json``. Anchors are numbered; no file of a bank contains ids."""

    version: int = SCHEMA
    base: str
    base_fingerprint: str
    base_note: str
    task: Task
    encoder: str
    encoder_fingerprint: str
    run: Run
    work: str
    plan: str
    items: tuple[int, ...]
    people: tuple[int, ...]  # behind each anchor
    tried: tuple[tuple[int, float], ...] = ()  # numbers of groups, with the gain of people outside, round by round
    cut: dict[str, int] = {}
    seconds: dict[str, float] = {}
    members: Members
    files: dict[str, str]
    hash: str = ""  # ``with_hash`` sets it
    calibration: CalibrationInfo | None = None

    @field_validator("run")
    @classmethod
    def _of_any_machine(cls, run: Run) -> Run:
        """Reset the device: the process that opens a bank chooses it, so a bank built on a GPU opens on a CPU."""
        return run.model_copy(update={"device": "auto"})

    def unseen(self, person: Person) -> int | None:
        """Return how many first items this person kept back from the task LoRA.

        None for all who are not known to have done so: people outside the bank, anchors, and other first items.
        """
        count = self.run.task_lora.kept_back
        if count is None or self.members.trained(person.id, "anchor"):
            return None
        return count if self.members.kept_back(person.first(count)) else None


def write_info(folder: Path, info: BankInfo) -> None:
    """Write the members, then ``bank.json``, with a sha256 over its own content."""
    if info.members.hashed:
        write_text(folder / MEMBERS, info.members.hashed.to_bytes().decode())
    values = info.model_dump(mode="json")
    write_json(folder / INFO, values | {"sha256": seal(values)})


def write_task(folder: Path, task: Task) -> None:
    """Replace a finished bank's task by one that differs in ``UNTRAINED`` only; the bank's hash does not change."""
    if (info := read_info(folder)).task != task:
        write_info(folder, info.model_copy(update={"task": task}))


def read_info(folder: Path) -> BankInfo:
    """Return the description of a bank. Raises BankNotFound, BankCorrupt."""
    path = folder / INFO
    try:
        info = BankInfo.model_validate(read_description(folder))
    except FileNotFoundError:
        raise BankNotFound(
            f"no bank at {folder}: {INFO} is missing",
            hint="Give the folder of a bank (--bank FOLDER), or build a bank: mta bank build --help",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BankCorrupt(
            f"{path} does not describe a bank: {str(error).splitlines()[0]}", hint=restore(folder)
        ) from None
    if other := info.files.keys() - set(HASHED_FILES):  # opening a bank must not read other files of this machine
        raise BankCorrupt(
            f"{path} names {min(other)!r}, which is no file of a bank; expected some of {', '.join(HASHED_FILES)}",
            hint=restore(folder),
        )
    hashed = _read_members(folder, info.members.sha256)
    return info.model_copy(update={"members": info.members.model_copy(update={"hashed": hashed})})


def check_base(folder: Path, info: BankInfo, name: str, fingerprint: str) -> None:
    """Raise BankMismatch if the bank was built for a base with another fingerprint."""
    if info.base_fingerprint != fingerprint:
        quantized = f", quantize={info.run.quantize}" * (info.run.quantize != "none")
        raise BankMismatch(
            f"{folder} was built for base {info.base!r}{quantized} (sha256 {info.base_fingerprint[:8]}…), "
            f"but the loaded base is {name!r} (sha256 {fingerprint[:8]}…)",
            hint="A bank works only with the base that it was trained on. Load that base, or rebuild:  "
            f"mta bank build --base {name}",
        )


def read_description(folder: Path) -> dict[str, Any]:
    """Return ``bank.json`` without its sha256. Raises BankCorrupt, OSError, ValueError, RecursionError."""
    path = folder / INFO
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, expected a JSON object")
    if values.get("version") != SCHEMA:
        raise BankCorrupt(
            f"{path} has schema version {values.get('version')!r}; this mta reads version {SCHEMA}",
            hint="Use the version of mta that wrote it, or build the bank again:  mta bank build --out NEW",
        )
    if "sha256" in values and values.pop("sha256") != seal(values):
        raise BankCorrupt(f"{path} was changed: its sha256 does not match its content", hint=restore(folder))
    return values


def _read_members(folder: Path, sha256: str) -> MemberHashes | None:
    """Return the members; None if there is no file. Raises BankCorrupt if it has another ``sha256``."""
    path = folder / MEMBERS
    try:
        data = path.read_bytes()
        if (digest := hashlib.sha256(data).hexdigest()) != sha256:
            raise BankCorrupt(_changed(path, digest, sha256), hint=restore(folder))
        return MemberHashes.model_validate_json(data)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BankCorrupt(f"{path} cannot be read: {str(error).splitlines()[0]}", hint=restore(folder)) from None


def file_hashes(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the sha256 of each file."""
    return {name: file_sha256(folder / name) for name in names}


def verify(folder: Path, info: BankInfo, *, full: bool = False) -> None:
    """Check the hashes of all files the first time or if ``full``, later sizes and times. Raises BankCorrupt."""
    seen = {}
    for name in info.files:
        if not (folder / name).is_file():
            raise BankCorrupt(f"{folder / name} is missing", hint=restore(folder))
        status = (folder / name).stat()
        seen[name] = [status.st_size, status.st_mtime_ns]
    note = cache_dir() / "verified" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}.json"
    state = {"bank": info.hash, "files": seen}
    if not full and read_json(note) == state:
        return
    for name, digest in file_hashes(folder, list(info.files)).items():
        if digest != info.files[name]:
            raise BankCorrupt(_changed(folder / name, digest, info.files[name]), hint=restore(folder))
    with contextlib.suppress(OSError):  # with a read-only cache, the next call checks the hashes again
        write_json(note, state, private=False)


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Raise BankCorrupt for files of a bank that cannot be read."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise BankCorrupt(f"{folder} cannot be read: {error}", hint=restore(folder)) from None


def read_adapters(folder: Path, info: BankInfo) -> tuple[LoraBatch, LoraBatch | None]:
    """Return the anchors as stored, and the task LoRA if there is one. Raises BankCorrupt."""
    with reading(folder):
        anchors = LoraBatch.of_tensors(load_file(folder / ANCHORS), info.run.bank.lora.scale)
        task_lora = read_peft(folder / TASK_LORA) if info.run.task_lora.enabled else None
    if len(anchors) != len(info.items) or (task_lora and task_lora.shapes != anchors.shapes):
        raise BankCorrupt(f"{folder}: anchors, task LoRA, and description do not match", hint=restore(folder))
    return anchors, task_lora


def read_calibration(folder: Path, info: BankInfo) -> Calibration | None:
    """Return the bank's calibration; None if it has none. Raises BankCorrupt."""
    if info.calibration is None:
        return None
    with reading(folder):
        tensors = load_file(folder / CALIBRATION)
        calibration = Calibration(tensors["mu"], tensors["curvature"], info.calibration)
    if calibration.mu.shape != (len(info.items),) or calibration.curvature.shape != (len(info.items),) * 2:
        raise BankCorrupt(f"{folder}: anchors and calibration do not match", hint=restore(folder))
    return calibration


def seal(values: dict[str, Any]) -> str:
    """Return the sha256 of values as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _changed(path: Path, digest: str, expected: str) -> str:
    return f"{path} was changed or cut short: its sha256 is {digest[:12]}…, {INFO} says {expected[:12]}…"


def with_hash(info: BankInfo) -> BankInfo:
    """Return the description with the hash that identifies the bank.

    It covers the hashes of all files, but not the seconds and ``UNTRAINED`` of the task, which may change later.
    """
    left_out: Any = {"hash": True, "seconds": True, "task": UNTRAINED}
    return info.model_copy(update={"hash": seal(info.model_dump(mode="json", exclude=left_out))})
