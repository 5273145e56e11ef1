"""A bank to the hub and back: what may leave, what must not, and what to know before it does.

Only files named here leave: those the description seals, the description and the card. Members stay, unless they are
asked for; so do the places of this machine. The bank's hash stays what it was, for people's states name it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mta.bank.card import card, table_of
from mta.bank.format import (
    ANCHORS,
    INDEX,
    INFO,
    MEMBERS,
    TASK_LORA,
    BankInfo,
    note_published,
    read_description,
    read_info,
    seal,
    stale,
    verify,
)
from mta.errors import BankCorrupt, BankError, HubError, InputError
from mta.lora.peft import CONFIG, WEIGHTS
from mta.system.assets import ASSETS
from mta.system.hub import Parcel, Repository, is_hub_id, snapshot

CARD = "README.md"
_ADAPTER = f"{TASK_LORA}/{CONFIG}"
_SEALED = (ANCHORS, INDEX, _ADAPTER, f"{TASK_LORA}/{WEIGHTS}")
_ALL = (*_SEALED, INFO, MEMBERS, CARD)


def bank_parcel(
    folder: Path, place: str, *, results: Path | None = None, license: str = "", with_members: bool = False
) -> Parcel:
    """What would leave this machine if the bank in a folder were published as ``place``; nothing is sent.

    ``results`` is the results.json of ``mta evaluate --out``, for the card. Raises BankError where somebody asked to be
    forgotten or the bank holds what is no bank's; BankCorrupt, InputError.
    """
    info = read_info(folder)
    if parts := stale(folder):
        raise BankError(
            f"somebody who asked to be forgotten is in the {' and the '.join(parts)} of {folder}: it is not published",
            hint="Rebuild it without them:  mta bank build",
        )
    if strange := sorted(set(info.files) - set(_SEALED)):
        raise BankError(
            f"{folder} holds {strange[0]}, which is no bank's file: it is not published",
            hint="Rebuild the bank with this mta:  mta bank build",
        )
    if with_members and info.members.hashed is None:
        raise BankError(f"{folder} has no {MEMBERS} to publish", hint="Publish it without them.")
    verify(folder, info, full=True)
    quoted = _quoted(results, info) if results else ""
    sent: dict[str, Path | bytes] = {name: folder / name for name in info.files}
    if with_members and info.members.hashed:
        sent[MEMBERS] = info.members.hashed.to_bytes()
    values = _portable(folder, sent)
    sent[INFO] = (json.dumps(values | {"sha256": seal(values)}, indent=1, ensure_ascii=False) + "\n").encode()
    told = BankInfo.model_validate(values)
    sent[CARD] = card(told, place, quoted, license).encode()
    return Parcel(dict(sorted(sent.items())), _facts(told, license, with_members))


def publish_bank(folder: Path, place: str, parcel: Parcel, *, private: bool = True, token: str | None = None) -> str:
    """Send a parcel of ``bank_parcel`` as one commit and return the repository's address. Raises HubError.

    The folder notes where, so that ``mta forget`` can name the copy there.
    """
    repository = Repository.begin(place, private=private, token=token)
    note_published(folder, repository.url)  # before it is there: one too many can be looked for
    repository.send(parcel, "Publish a bank of mta", ours=_ALL)
    return repository.url


def bank_folder(name: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """A folder as it is; a hub id's bank in the hub's cache, whole. A folder that exists wins.

    Raises HubError, BankCorrupt.
    """
    if not is_hub_id(str(name)):
        return Path(name)
    repo = str(name)
    try:  # the description first: else a repository of whole models would be fetched to see
        first = snapshot(repo, [INFO], revision, token)
    except HubError as error:
        beside = "" if revision else f" There is no folder {repo} here either; to build one: mta bank build --help"
        raise HubError(error.message, hint=error.hint + beside) from None
    if not (first / INFO).exists():
        raise BankCorrupt(
            f"there is no folder {repo}, and {repo!r} on the hub is no bank: it has no {INFO}",
            hint="Check the name.",
        )
    try:
        info = read_info(first)
        folder = snapshot(repo, [name for name in _ALL if name not in _SEALED or name in info.files], first.name, token)
        verify(folder, read_info(folder))
    except BankCorrupt as error:
        again = f"Remove it from the hub's cache and try again:  hf cache rm model/{repo}"
        raise BankCorrupt(f"{repo!r} came damaged from the hub: {error.message}", hint=again) from None
    return folder


def _portable(folder: Path, sent: dict[str, Path | bytes]) -> dict[str, Any]:
    """The description without members and without places of this machine; what else names them is put into ``sent``.

    A base or an encoder that lies in a folder here is called by the folder's name alone.
    """
    values, inside = read_description(folder)
    if inside and MEMBERS not in sent:  # of schema 1, whose key is made of what the description tells
        values["members"] = values["members"] | {"sha256": ""}
    run = values["run"] = dict(values["run"]) | {"device": "auto"}
    if Path(run["base"]).is_absolute():
        values["base"] = run["base"] = Path(run["base"]).name
        if _ADAPTER in sent:
            adapter = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))
            data = json.dumps(adapter | {"base_model_name_or_path": run["base"]}, indent=2).encode() + b"\n"
            sent[_ADAPTER], digest = data, hashlib.sha256(data).hexdigest()
            values["files"] = values["files"] | {_ADAPTER: digest}
    if Path(run["encoder"]).is_absolute():
        values["encoder"] = run["encoder"] = Path(run["encoder"]).name
    return values


def _facts(info: BankInfo, license: str, with_members: bool) -> dict[str, str]:
    """What to know before it leaves."""
    members = info.members
    asset = ASSETS.get(info.base)
    guess = "whoever has them and their key can test whether somebody they guess is among them"
    return {
        "license": license or "none said (--license): on the hub that means that nobody may use it",
        "base": info.base
        + (f" ({asset.licence})" if asset else ": see its own license, which may bind what is made of it"),
        "data": f"histories of {members.task} people behind the task LoRA, {members.candidates} candidates and "
        f"{members.anchors} anchors, for the task {info.task['name']!r}: their terms must allow this",
        "people": "no id and no text is in these files, but weights tell: every anchor's meta-LoRA is there at full "
        "strength, and whether an item was among its texts can be told better than by guessing "
        "(docs/explanation/privacy.md)",
        "counts": f"{INFO} tells how many items each anchor had, the wording of the task and all settings",
        "members": f"{MEMBERS} leaves too: {guess}" if with_members else f"stay here ({MEMBERS}): {guess}",
    }


def _quoted(path: Path, info: BankInfo) -> str:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        table, seconds = table_of(results), results.get("meta", {}).get("bank_seconds")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be quoted on the card: {type(error).__name__}: {str(error) or 'nothing in it'}",
            hint="Give the results.json of:  mta evaluate people.jsonl --bank bank/ --out results/",
        ) from None
    if seconds is not None and seconds != info.seconds:
        raise InputError(f"{path} holds the results of another bank", hint="Evaluate this bank, and give those.")
    return table
