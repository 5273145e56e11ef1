"""Publish a person's exported adapter on the hub."""

from __future__ import annotations

import json
from pathlib import Path

from mta.errors import InputError
from mta.lora.peft import CARD, CONFIG, WEIGHTS, has_own_card, read_peft
from mta.store import Store
from mta.store.exports import Export
from mta.system.hub import Parcel, Repository, public_name


def adapter_parcel(folder: Path) -> Parcel:
    """Return the files and facts that a push of an exported adapter would send; nothing is sent.

    A local base is named by its folder's name only, without the path. Raises InputError.
    """
    read_peft(folder)  # raises if the adapter is incomplete or not plain LoRA
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    base = public_name(str(config.get("base_model_name_or_path") or ""))
    if not has_own_card(folder):
        raise InputError(
            f"{folder} has no card from mta export; its {CARD} would be published unchecked",
            hint="Export to a new folder, and push that folder.",
        )
    data = json.dumps(config | {"base_model_name_or_path": base}, indent=2).encode() + b"\n"
    facts = {
        "people": "this is one person's model: it was trained on their texts and reveals something about them. "
        "Push it only if they agree, and under a name that does not identify them",
        "base": base,
        "forgetting": "mta forget names the repository; delete the repository and copies by hand",
    }
    return Parcel({CARD: folder / CARD, CONFIG: data, WEIGHTS: folder / WEIGHTS}, facts)


def publish_adapter(
    person: str, folder: Path, repo_id: str, store: Store | None, *, private: bool, token: str | None
) -> str:
    """Push a person's adapter from its export folder; return the repository's address. See ``push_to_hub``."""
    since = store.tombstones.of(person) if store else ()
    parcel = adapter_parcel(folder)
    if store and not store.exports.written(person, folder):
        raise InputError(f"no adapter of that person was exported to {folder}", hint="Export to that folder first.")
    repository = Repository.begin(repo_id, private=private, token=token)
    if store:  # before the push, so that a killed push is reported too
        store.exports.note(person, Export.pushed(folder, repository.host, repository.name), since)
    repository.send(parcel, "Push an adapter of mta")
    return repository.url
