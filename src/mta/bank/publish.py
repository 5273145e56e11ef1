"""Publish a bank on the hub, and download published banks.

Only the description, the card, and the files whose hashes the description holds are sent; members and local paths
never. The bank keeps its hash, because people's states refer to it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mta.bank.card import card
from mta.bank.format import (
    HASHED_FILES,
    INFO,
    MEMBERS,
    PUBLISHED,
    TASK_LORA_CONFIG,
    BankInfo,
    read_description,
    read_info,
    seal,
    verify,
)
from mta.bank.notes import add_note, stale_report
from mta.errors import BankCorrupt, BankError, BankNotFound, HubError
from mta.lora.peft import CARD
from mta.system.assets import ASSETS
from mta.system.hub import Upload, is_hub_id, public_name, send, snapshot


def bank_upload(folder: Path, place: str, *, license: str = "") -> Upload:
    """Return the files and facts that publishing the bank in a folder as ``place`` would send; nothing is sent.

    Raises BankError if a person in the bank asked to be forgotten, BankCorrupt.
    """
    info = read_info(folder)
    _refuse_stale(folder)
    verify(folder, info, full=True)
    sent: dict[str, Path | bytes] = {name: folder / name for name in info.files}
    values = _portable(folder, sent)
    sent[INFO] = (json.dumps(values | {"sha256": seal(values)}, indent=1, ensure_ascii=False) + "\n").encode()
    public = BankInfo.model_validate(values)
    sent[CARD] = card(public, place, license).encode()
    return Upload(dict(sorted(sent.items())), _facts(public, license))


def publish_bank(folder: Path, place: str, upload: Upload, *, private: bool = True, token: str | None = None) -> str:
    """Send an upload of ``bank_upload`` as one commit, and return the repository's address.

    The address is noted in the bank's folder, so that ``mta forget`` can report the copy. Raises HubError, and
    BankError if a person in the bank was forgotten since the upload was made.
    """

    def note(url: str) -> None:
        add_note(folder, PUBLISHED, [url])  # before sending: an interrupted upload must be noted too
        _refuse_stale(folder)  # again: who is forgotten from now on finds the note

    _refuse_stale(folder)
    return send(upload, place, (*HASHED_FILES, INFO, CARD), note, private, token)


def _refuse_stale(folder: Path) -> None:
    """Raise BankError if a person in a bank was forgotten."""
    if report := stale_report(folder):
        raise BankError(f"{report.message}: the bank is not published", hint=report.hint)


def bank_folder(name: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Return the folder of a bank, which is downloaded for a hub id without a folder.

    Raises HubError, BankNotFound, BankCorrupt.
    """
    repo = str(name)
    if not is_hub_id(repo):
        return Path(name)
    try:  # the description first, so that nothing else is downloaded from a repository without a bank
        first = snapshot(repo, [INFO], revision, token)
    except HubError as error:
        local = "" if revision else f" There is no folder {repo} either; to build a bank: mta bank build --help"
        raise HubError(error.message, hint=error.hint + local) from None
    if not (first / INFO).exists():
        raise BankNotFound(
            f"there is no folder {repo}, and {repo!r} on the hub is not a bank: it has no {INFO}",
            hint="Check the name.",
        )
    try:
        info = read_info(first)
        folder = snapshot(repo, [INFO, CARD, *info.files], first.name, token)
        verify(folder, info)
    except BankCorrupt as error:
        hint = f"Remove the download from the hub's cache and try again:  hf cache rm model/{repo}"
        raise BankCorrupt(f"the download of {repo!r} from the hub is damaged: {error.message}", hint=hint) from None
    return folder


def _portable(folder: Path, sent: dict[str, Path | bytes]) -> dict[str, Any]:
    """Return the description without members and local paths; add other files without paths to ``sent``.

    A local base or encoder is named by its folder's name only, without the path.
    """
    values = read_description(folder)
    run = values["run"] = dict(values["run"]) | {"device": "auto"}
    values["base"] = run["base"] = public_name(run["base"])
    values["encoder"] = run["encoder"] = public_name(run["encoder"])
    if TASK_LORA_CONFIG in sent:
        adapter = json.loads((folder / TASK_LORA_CONFIG).read_text(encoding="utf-8"))
        if adapter.get("base_model_name_or_path") != run["base"]:
            data = json.dumps(adapter | {"base_model_name_or_path": run["base"]}, indent=2).encode() + b"\n"
            sent[TASK_LORA_CONFIG] = data
            values["files"] = values["files"] | {TASK_LORA_CONFIG: hashlib.sha256(data).hexdigest()}
    return values


def _facts(info: BankInfo, license: str) -> dict[str, str]:
    """Return the facts to show before a bank is sent."""
    members = info.members
    asset = ASSETS.get(info.base)
    terms = f" ({asset.licence})" if asset else ": check the base's license, which may also cover adapters"
    return {
        "license": license or "none (--license): without a license, users of the hub may not use the bank",
        "base": info.base + terms,
        "data": f"histories of {members.task} people behind the task LoRA, {members.candidates} candidates, and "
        f"{members.anchors} of them behind anchors, for the task {info.task.name!r}: the terms of these data "
        "must allow publishing",
        "people": "these files contain no id and no text, but every anchor's meta-LoRA at full strength: from it, one "
        "can tell better than by guessing whether an item was among the anchor's texts (docs/explanation/privacy.md)",
        "counts": f"{INFO} contains the number of items of each anchor, the task's wording, and all settings",
        "members": f"not sent ({MEMBERS}): its readers could test whether a guessed id is in the bank",
    }
