"""Read and write adapters as PEFT folders: adapter_config.json and adapter_model.safetensors, one adapter each.

Tensors are named ``base_model.model.<layer>.lora_A.weight`` (R, D) and ``...lora_B.weight`` (O, R). Only JSON and
safetensors are read.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mta.errors import InputError
from mta.lora.batch import LoraBatch
from mta.system.atomic import replacing_folder, sync_folder, unfinished_in, write_tensors, write_text

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
MARK = "<!-- A card that mta export wrote: mta forget removes it with the adapter. -->"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_WRITTEN = {"peft_type": "LORA", "bias": "none", "modules_to_save": None, "use_rslora": False, "use_dora": False}
_DAMAGED = SafetensorError, OSError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError
_AGAIN = "Export the adapter again, or copy its folder whole."


def write_peft(
    folder: str | Path,
    adapter: LoraBatch,
    base_name: str,
    *,
    fan_in_fan_out: bool = False,
    card: str = "",
    on_weights: Callable[[Path], None] | None = None,
) -> None:
    """Write a batch of exactly one adapter as a PEFT folder; ``fan_in_fan_out`` is for GPT-2's Conv1D layers.

    A new folder appears complete, by rename. In an existing folder only the two files are replaced, the configuration
    last: a killed export leaves no configuration, never new weights with an old alpha. ``card`` becomes the README.md,
    unless there is one that mta did not write.
    ``on_weights`` is called with the file of the complete weights before they appear in the folder. Raises InputError.
    """
    if len(adapter) != 1:
        raise InputError(
            f"a PEFT folder holds exactly one adapter, got a batch of {len(adapter)}",
            hint="Choose one:  write_peft(folder, batch.select([0]), ...)",
        )
    target = Path(folder).resolve()
    if target.exists() and not target.is_dir():
        raise InputError(f"{folder} is a file, expected a folder to write an adapter to", hint="Choose another folder.")
    with replacing_folder(target, _publish, inside=target.exists()) as temporary:
        write_tensors(temporary / WEIGHTS, _tensors(adapter), {"format": "pt"})
        config = _config(adapter, base_name, fan_in_fan_out)
        write_text(temporary / CONFIG, json.dumps(config, indent=2) + "\n")
        if card:
            write_text(temporary / CARD, card)
        if on_weights:
            on_weights(temporary / WEIGHTS)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary folders that killed exports left beside a folder, or in it. Raises OSError."""
    for place in (folder.parent, folder):
        for left in list(unfinished_in(place, glob.escape(folder.name))):
            while left.exists():
                with contextlib.suppress(FileNotFoundError):  # its writer removes files too
                    shutil.rmtree(left)
            sync_folder(place)


def has_own_card(folder: Path) -> bool:
    """Return whether ``write_peft`` wrote the README.md of a folder."""
    try:
        return MARK in (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def read_peft(folder: str | Path) -> LoraBatch:
    """Return the adapter of a PEFT folder that mta wrote as a batch of one.

    Raises InputError for missing or damaged files, and for other kinds of adapters.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        if odd := _odd(config, tensors):
            raise InputError(odd, hint=_AGAIN)
        flat = {n.removeprefix(_PREFIX).replace(_A, ".a").replace(_B, ".b"): t[None] for n, t in tensors.items()}
        adapter = LoraBatch.of_tensors(flat, float(config["lora_alpha"]) / config["r"])
        if type(config["r"]) is not int or adapter.rank != config["r"]:
            raise InputError(f"r is {config['r']!r}, but its factors have rank {adapter.rank}", hint=_AGAIN)
    except _DAMAGED as e:
        reason = e.message if isinstance(e, InputError) else f"{type(e).__name__}: {e}"
        raise InputError(f"{folder} holds no adapter that mta can read: {reason}", hint=_AGAIN) from e
    finite = (part.is_floating_point() and part.isfinite().all() for part in flat.values())
    if not math.isfinite(adapter.scale) or not all(finite):
        raise InputError(f"{folder} holds values that are not finite floats", hint=_AGAIN)
    return adapter


def _odd(config: Any, tensors: Mapping[str, Tensor]) -> str:
    """Return the first setting or tensor that ``write_peft`` does not write; "" without one."""
    for key, value in _WRITTEN.items():
        if config.get(key, value) != value:
            return f"{key} is {config[key]!r}, expected {value!r}"
    named = (name for name in tensors if not (name.startswith(_PREFIX) and name.endswith((_A, _B))))
    name = next(named, "")
    return f"the tensor {name!r} is not named {_PREFIX}<layer>{_A} or {_B.lstrip('.')}" if name else ""


def _tensors(adapter: LoraBatch) -> dict[str, Tensor]:
    ends = {"a": _A, "b": _B}
    parts = {f"{_PREFIX}{key[:-2]}{ends[key[-1]]}": part[0] for key, part in adapter.tensors().items()}
    return {name: part.clone() for name, part in parts.items()}  # cloned: views of one buffer cannot be saved


def _config(adapter: LoraBatch, base_name: str, fan_in_fan_out: bool) -> dict[str, Any]:
    return {
        **_WRITTEN,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": alpha_of(adapter.scale, adapter.rank),
        "lora_dropout": 0.0,
        "fan_in_fan_out": fan_in_fan_out,
        # Full names in a list, not a pattern: PEFT then adapts only these layers, and vLLM requires a list.
        "target_modules": adapter.names,
    }


def alpha_of(scale: float, rank: int) -> int | float:
    """Return the alpha for which alpha / rank equals ``scale``, exactly if a double allows it, else within one bit."""
    near = float(scale * rank)
    around = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    alpha = next((value for value in around if value / rank == scale), near)
    return int(alpha) if alpha.is_integer() else alpha


def _publish(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    (target / CONFIG).unlink(missing_ok=True)
    if (temporary / CARD).exists() and (has_own_card(target) or not (target / CARD).exists()):
        (temporary / CARD).replace(target / CARD)
    for name in (WEIGHTS, CONFIG):
        (temporary / name).replace(target / name)
    sync_folder(target)
