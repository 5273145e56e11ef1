"""Identity of weights: one sha256 over stored tensors and tokenizer, independent of the loaded dtype."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mta.errors import ModelError
from mta.system.model_files import weight_files

_PROBE = "The quick brown fox, aged 42, said: «Привет, 世界!»\n\tnaïve café — don't stop…"


def fingerprint_of(tensors: Mapping[str, Tensor], tokenizer: Any) -> str:
    """Return the sha256 over names, dtypes, shapes, and bytes of tensors, then tokenizer and chat template."""
    return _digest(sorted(tensors), lambda name: tensors[name], tokenizer)


def folder_fingerprint(folder: str | Path, tokenizer: Any, files: Sequence[Path] | None = None) -> str:
    """Return the fingerprint of stored weights, independent of sharding and of the dtype they are loaded in.

    ``files`` are the weight files, by default those that transformers loads. Names of tensors in a folder below
    ``folder`` include that folder. Raises ModelError, and OSError if a file is missing.
    """
    place: dict[str, tuple[Path, str]] = {}
    for file in weight_files(Path(folder)) if files is None else files:
        inner = file.parent.relative_to(folder).as_posix()
        with safe_open(file, framework="pt") as stored:
            place |= {key if inner == "." else f"{inner}/{key}": (file, key) for key in stored.keys()}

    def read(name: str) -> Tensor:
        file, key = place[name]
        with safe_open(file, framework="pt") as stored:
            return stored.get_tensor(key)

    return _digest(sorted(place), read, tokenizer)


def _digest(names: list[str], read: Callable[[str], Tensor], tokenizer: Any) -> str:
    if unsafe := [name for name in names if re.search(r"[\x00-\x1f\x7f]", name)]:  # could look like a separate line
        raise ModelError(
            f"a tensor is named {unsafe[0]!r}, with a control character; expected a plain name",
            hint="Give weights as transformers saves them (save_pretrained).",
        )
    digest = hashlib.sha256()
    for name in names:
        tensor = read(name).detach().cpu().contiguous()
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    # Hash the vocabulary and the tokens of a probe text, because the layout of tokenizer files changes with versions.
    words = sorted(tokenizer.get_vocab().items())
    probe = list(tokenizer(_PROBE)["input_ids"])
    digest.update(json.dumps([words, probe, getattr(tokenizer, "chat_template", None)], sort_keys=True).encode())
    return digest.hexdigest()
