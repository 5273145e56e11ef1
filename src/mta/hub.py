"""Weights by name: an asset, a local folder, or a hub id."""

from __future__ import annotations

from pathlib import Path

from mta.assets import ASSETS, resolve
from mta.errors import AssetError


def local_folder(name: str) -> str:
    """The folder of an asset, a local folder, or a hub snapshot (safetensors and JSON only)."""
    place = resolve(name)
    if Path(place).is_dir():
        return place
    from huggingface_hub import snapshot_download

    kinds = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
    try:
        return str(snapshot_download(place, allow_patterns=kinds))
    except Exception as error:  # the hub's client raises many kinds: offline, unknown, gated
        raise AssetError(
            f"{name!r} is neither an asset ({', '.join(ASSETS)}) nor a folder, and the hub did not give it: "
            f"{str(error).splitlines()[0]}",
            hint="Check the name, or download it where there is a network and give the folder.",
        ) from None
