"""Which weights these are: one sha256 over stored tensors and tokenizer, whatever they are loaded as."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_PROBE = "The quick brown fox, aged 42, said: «Привет, 世界!»\n\tnaïve café — don't stop…"


def fingerprint_of(tensors: Mapping[str, Tensor], tokenizer: Any) -> str:
    """Sha256 over names, dtypes, shapes and bytes of tensors, then tokenizer and chat template."""
    return _digest(sorted(tensors), lambda name: tensors[name], tokenizer)


def folder_fingerprint(folder: str | Path, tokenizer: Any) -> str:
    """The fingerprint of stored weights: independent of sharding and of the dtype they are loaded in."""
    place: dict[str, Path] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            place |= dict.fromkeys(stored.keys(), file)

    def read(name: str) -> Tensor:
        with safe_open(place[name], framework="pt") as stored:
            return stored.get_tensor(name)

    return _digest(sorted(place), read, tokenizer)


def _digest(names: list[str], read: Callable[[str], Tensor], tokenizer: Any) -> str:
    digest = hashlib.sha256()
    for name in names:
        tensor = read(name).detach().cpu().contiguous()
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    # The vocabulary and how it splits a probe text, rather than tokenizer files, whose layout changes between versions.
    words = sorted(tokenizer.get_vocab().items())
    probe = list(tokenizer(_PROBE)["input_ids"])
    digest.update(json.dumps([words, probe, getattr(tokenizer, "chat_template", None)]).encode())
    return digest.hexdigest()
