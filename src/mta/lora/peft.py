"""Read and write adapters as PEFT folders: adapter_config.json and adapter_model.safetensors, one adapter each.

Tensors are named ``base_model.model.<layer>.lora_A.weight`` (R, D) and ``...lora_B.weight`` (O, R). Only JSON and
safetensors are read. Adapters that are not ``scale * B @ A`` over unchanged base weights are refused.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mta.errors import InputError
from mta.lora.batch import Factors, LoraBatch, even
from mta.system.atomic import replacing_folder, sync_folder, unfinished_in, write_tensors, write_text

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_HOLDS, _WHOLE = "mta", "a person's whole adapter: task LoRA, merge, and stack"  # metadata of the weights
CARD = "README.md"
MARK = "<!-- A card that mta export wrote: mta forget removes it with the adapter. -->"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_NOT_PLAIN = (  # settings that change the update, or change more than the linear layers
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save"),
    *("target_parameters", "trainable_token_indices", "layer_replication", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "monteclora_config"),
)
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations that subtract from W0
_ALPHA = "alpha_pattern", "lora_alpha"
_HINT = "mta reads plain LoRA: bias 'none', linear layers only."


def write_peft(
    folder: str | Path,
    adapter: LoraBatch,
    base_name: str,
    *,
    fan_in_fan_out: bool = False,
    card: str = "",
    whole: bool = False,
    on_weights: Callable[[Path], None] | None = None,
) -> None:
    """Write a batch of exactly one adapter as a PEFT folder; ``fan_in_fan_out`` is for GPT-2's Conv1D layers.

    A new folder appears complete, by rename. In an existing folder only the two files are replaced, the configuration
    last: a killed export leaves no configuration, never new weights with an old alpha. ``card`` becomes the README.md,
    unless there is one that mta did not write. ``whole`` marks a person's whole adapter (see ``is_whole``).
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
        write_tensors(temporary / WEIGHTS, _tensors(adapter), {"format": "pt"} | ({_HOLDS: _WHOLE} if whole else {}))
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


def is_whole(folder: Path) -> bool:
    """Return whether the weights of a readable PEFT folder are a person's whole adapter that mta wrote."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return (file.metadata() or {}).get(_HOLDS) == _WHOLE


def read_peft(folder: str | Path) -> LoraBatch:
    """Return the adapter of a PEFT folder as a batch of one, with rsLoRA's scale if it is set.

    Half precision becomes float32.
    Layers with an own rank or alpha (``rank_pattern``, ``alpha_pattern``) are zero-padded to the largest rank, and
    their scales are folded into B.
    Raises InputError for missing or damaged files and for adapters that are not plain LoRA.
    """
    config = _read_config(Path(folder))
    _refuse_more_than_lora(folder, config)
    pairs = _pairs(folder, _read_weights(Path(folder)))
    parts = {name: LoraBatch({name: pair}, _scale(folder, config, name, pair)) for name, pair in pairs.items()}
    if len({part.scale for part in parts.values()}) > 1:
        parts = {name: part.scaled_into_b() for name, part in parts.items()}
    factors = {name: part.factors[name] for name, part in parts.items()}
    return replace(even(factors), scale=next(iter(parts.values())).scale)


def _scale(folder: str | Path, config: Mapping[str, Any], name: str, factors: Factors) -> float:
    """Return the scale of one layer. Raises InputError for factors that do not fit its settings."""
    a, b = factors
    rank, alpha = (_setting(folder, config, name, *keys) for keys in (("rank_pattern", "r"), _ALPHA))
    # An alpha of more than a double's range would be infinite: JSON integers have no limit.
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
        raise InputError(
            f"{folder}: r is {rank!r} and lora_alpha {alpha!r}, expected a positive integer and a finite number",
            hint=f"Correct {CONFIG}, or export the adapter again.",
        )
    if a.ndim != 3 or b.ndim != 3 or a.shape[1] != rank or b.shape[2] != rank:
        raise InputError(
            f"{folder}: layer {name!r} has A {tuple(a.shape[1:])} and B {tuple(b.shape[1:])}, "
            f"expected rank {rank}, the r of {CONFIG}",
            hint=f"Correct r in {CONFIG}, or export the adapter again.",
        )
    if not all(part.is_floating_point() and part.double().isfinite().all() for part in (a, b)):
        raise InputError(
            f"{folder}: layer {name!r} has A of {a.dtype} and B of {b.dtype} with values that are not finite, "
            "or of a type that is not floating point; expected finite floating point numbers",
            hint="Export the adapter again from training that did not diverge.",
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _setting(folder: str | Path, config: Mapping[str, Any], name: str, pattern: str, key: str) -> Any:
    """Return a layer's own setting if the pattern has one, by the end of its name as in PEFT, else that of all layers.

    Patterns are names: a regular expression of a foreign file could take forever. Raises InputError.
    """
    own = config.get(pattern) or {}
    if not isinstance(own, dict) or not all(re.fullmatch(r"\^?[\w.]+", layer) for layer in own):
        raise InputError(f"{folder}: {pattern} is {own!r}, expected names of layers and numbers", hint=_HINT)
    return next((value for layer, value in own.items() if _ends(name, layer)), config.get(key))


def _ends(name: str, layer: str) -> bool:
    return name == layer.removeprefix("^") or (layer[0] != "^" and name.endswith(f".{layer}"))


def _tensors(adapter: LoraBatch) -> dict[str, Tensor]:
    ends = {"a": _A, "b": _B}
    parts = {f"{_PREFIX}{key[:-2]}{ends[key[-1]]}": part[0] for key, part in adapter.tensors().items()}
    return {name: part.clone() for name, part in parts.items()}  # cloned: views of one buffer cannot be saved


def _config(adapter: LoraBatch, base_name: str, fan_in_fan_out: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": alpha_of(adapter.scale, adapter.rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        # Full names in a list, not a pattern: PEFT then adapts only these layers, and vLLM requires a list.
        "target_modules": adapter.names,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{folder} is not a PEFT folder: {CONFIG} is missing", hint=f"Give the folder that holds {CONFIG}."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}", hint="Export the adapter again.") from error
    if not isinstance(config, dict):
        raise InputError(
            f"{path} holds a {type(config).__name__}, expected a JSON object of LoRA settings",
            hint="Export the adapter again.",
        )
    return config


def _refuse_more_than_lora(folder: str | Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(f"{folder}: peft_type is {config.get('peft_type')!r}, expected 'LORA'", hint=_HINT)
    if config.get("bias", "none") != "none":
        raise InputError(f"{folder}: bias is {config['bias']!r}, expected 'none'", hint=_HINT)
    for key in _NOT_PLAIN:
        if config.get(key):
            raise InputError(f"{folder}: {key} is {config[key]!r}, expected it unset", hint=_HINT)
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_REWRITES_BASE):
        raise InputError(
            f"{folder}: init_lora_weights is {start!r}, which changes the base weights",
            hint="Convert it to plain LoRA when saving (PEFT: path_initial_model_for_weight_conversion).",
        )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise InputError(
            f"{folder}: {WEIGHTS} is missing"
            + (", and adapter_model.bin is a pickle, which mta never reads" * pickled),
            hint="Save the adapter again as safetensors:  save_pretrained(folder, safe_serialization=True)",
        )
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"{path} is not a complete safetensors file: {error}", hint="Copy or export the adapter again."
        ) from error


def _pairs(folder: str | Path, flat: Mapping[str, Tensor]) -> dict[str, Factors]:
    expected = f"expected pairs {_PREFIX}<layer>{_A} and {_B.lstrip('.')}"
    names = [key.removeprefix(_PREFIX).removesuffix(_A) for key in flat if key.startswith(_PREFIX) and key.endswith(_A)]
    known = {f"{_PREFIX}{name}{end}" for name in names for end in (_A, _B)}
    if odd := sorted(known ^ set(flat)):
        missing = "lacks" if odd[0] in known else "holds"
        raise InputError(f"{folder}: {WEIGHTS} {missing} the tensor {odd[0]!r}; {expected}", hint=_HINT)
    if not names:
        raise InputError(f"{folder}: {WEIGHTS} holds no tensor; {expected}", hint="Export the adapter again.")
    whole = {key: part.float() if part.dtype in (torch.float16, torch.bfloat16) else part for key, part in flat.items()}
    return {name: Factors(whole[f"{_PREFIX}{name}{_A}"][None], whole[f"{_PREFIX}{name}{_B}"][None]) for name in names}
