"""What is noted beside a bank: forgotten people, and published copies."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock

from mta.bank.format import PERMISSIONS, PUBLISHED, STALE, read_info
from mta.bank.members import TrainedPart
from mta.errors import BankError
from mta.system.atomic import file_mode, read_json, write_json

_WAIT = 60.0  # seconds for another process to write one small file


def mark_stale(folder: Path, person: str) -> list[TrainedPart]:
    """Note that the parts trained on this person need a rebuild, and return them. Raises BankError, BankCorrupt."""
    members = read_info(folder).members
    parts, hashed = members.parts_of(person), {members.hash_of(person)}
    if parts and not (set(parts) <= set(parts_to_rebuild(folder)) and hashed <= forgotten_in(folder)):
        add_note(folder, STALE, parts, hashed)
    return parts


def parts_to_rebuild(folder: Path) -> list[str]:
    """Return the parts that were trained on people who asked to be forgotten."""
    noted = read_json(folder / STALE)
    if isinstance(noted, dict):
        return list(noted.get("needs_rebuild", []))
    return ["bank"] if (folder / STALE).exists() else []  # a damaged note may name any part


def forgotten_in(folder: Path) -> set[str]:
    """Return the hashes of people in a bank who asked to be forgotten."""
    noted = read_json(folder / STALE)
    return set(noted.get("forgotten", [])) if isinstance(noted, dict) else set()


def stale_report(folder: Path) -> BankError | None:
    """Return what to say of a bank with a forgotten person; None without one."""
    if not (parts := parts_to_rebuild(folder)):
        return None
    message = f"a forgotten person is in the {' and the '.join(parts)} of {folder}"
    if parts == ["calibration"]:
        hint = "Leave that person out, and calibrate again:  mta bank calibrate --out NEW"
    else:
        hint = "Leave that person out, and make it anew:  mta bank build --out NEW"
    return BankError(message, hint=hint)


def published(folder: Path) -> list[str]:
    """Return the addresses that a bank was published to from this folder."""
    noted = read_json(folder / PUBLISHED)
    return list(noted.get("published", [])) if isinstance(noted, dict) else []


def pass_stale_on(folder: Path, copy: Path, without: str = "") -> None:
    """Note in a copy of a bank which parts need a rebuild, ``without`` one that was made anew, and who was forgotten.

    Raises BankError.
    """
    parts, gone = set(parts_to_rebuild(folder)) - {without}, forgotten_in(folder)
    if parts or gone:
        add_note(copy, STALE, parts, gone)


def add_note(folder: Path, name: str, entries: Iterable[str], hashed: Iterable[str] = ()) -> None:
    """Add entries to a list of a bank, and hashes of forgotten people; threads and processes wait for each other.

    Raises BankError.
    """
    key, listed = {STALE: ("needs_rebuild", parts_to_rebuild), PUBLISHED: ("published", published)}[name]
    try:
        with FileLock(folder / f".{name}.lock", timeout=_WAIT, mode=file_mode()):
            values = {key: sorted({*listed(folder), *entries})}
            more = {"forgotten": sorted({*forgotten_in(folder), *hashed})} if name == STALE else {}
            write_json(folder / name, values | more)
    except OSError as error:  # also if the lock is not free in time
        raise BankError(f"{folder / name} cannot be written: {error.strerror or error}", hint=PERMISSIONS) from None
