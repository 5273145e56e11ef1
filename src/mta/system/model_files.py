"""Find the files of a model folder that are loaded, and refuse folders that would run code or open pickles.

A bank built by others names its base and its encoder, so their folders are not trusted. transformers and
sentence-transformers read the names of classes, kernels, and other models from JSON files. ``trust_remote_code=False``
covers only a part of these names.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mta.errors import ModelError, MtaError, UnsupportedModel
from mta.system.atomic import read_json
from mta.system.process import is_out_of_memory

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_CONFIG, _MODULES = "config.json", "modules.json"
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_WITH_WEIGHTS = ("Dense", "LayerNorm", "CNN", "LSTM", "WeightedLayerPooling")
_MODULE_KINDS = ("Transformer", "Pooling", "Normalize", "Dropout", *_WITH_WEIGHTS)
_ENCODER_SETTINGS = re.compile(r"sentence_[\w-]+_config\.json")
_SETTINGS = {  # settings of a Transformer module that load nothing
    *("max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name"),
    *("processing_kwargs", "unpad_inputs", "query_length", "document_length", "query_expansion"),
}
_KEYWORDS = {f"{part}_{kind}" for part in ("model", "tokenizer", "processor", "config") for kind in ("args", "kwargs")}
_HARMLESS = {  # keywords that a Transformer module passes on; trust_remote_code is overridden
    *("attn_implementation", "dtype", "torch_dtype", "add_pooling_layer", "is_causal", "use_cache"),
    *("padding_side", "truncation_side", "model_max_length", "trust_remote_code"),
}
_IMPLEMENTATIONS = {  # values that load nothing; for others transformers fetches code from the hub
    "attn_implementation": ("eager", "sdpa"),
    "experts_implementation": ("eager", "grouped_mm", "batched_mm"),
}
_PLAIN = "Give a model of safetensors, JSON and tokenizer files only, of an architecture in transformers."


@dataclass(frozen=True, slots=True)
class Module:
    """One step of a sentence encoder: the name of its class, and its folder relative to the encoder's ("" = root)."""

    kind: str
    path: str

    def weight_files(self, folder: Path, name: str = "") -> list[Path]:
        """Return the weight files of the module of an encoder in ``folder``. Raises ModelError."""
        if self.kind == "Transformer":
            return weight_files(folder / self.path, name)
        return [folder / self.path / WEIGHTS] if self.kind in _WITH_WEIGHTS else []


def weight_files(folder: Path, name: str = "") -> list[Path]:
    """Return the weight files that transformers loads, in its order of preference; they need not exist.

    These are the files that config.json names, or else model.safetensors, or else the shards of the index. Other
    safetensors files (Mistral's consolidated.safetensors, adapters, other formats) are never loaded. Raises ModelError
    for a file that is not safetensors, or lies outside the folder; ``name`` is what the message calls the folder.
    """
    config = _json(folder / _CONFIG)
    named, source = config.get("transformers_weights"), name or str(folder)
    if any(key == "transformers_weights" for part in config.values() for key, _ in _items(part)):
        raise ModelError(
            f"{source!r}: a part of {_CONFIG} sets transformers_weights, which transformers may load instead",
            hint=f"Give a copy of the folder without that key in {_CONFIG}.",
        )
    if named is None and ((folder / WEIGHTS).exists() or not (folder / INDEX).exists()):
        return [folder / WEIGHTS]
    if named is not None and not str(named).endswith(".index.json"):
        return [folder / _safetensors(named, source)]
    index = INDEX if named is None else _safetensors(named, source, (".safetensors.index.json",))
    shards = _json(folder / index).get("weight_map")
    named_shards = {_safetensors(shard, source) for shard in shards.values()} if isinstance(shards, dict) else set()
    return [folder / shard for shard in sorted(named_shards)]


def modules_of(folder: Path, name: str) -> list[Module]:
    """Return the modules of a sentence encoder; a plain transformers folder is a Transformer alone.

    Raises UnsupportedModel for a module that may run code, or lies outside the folder.
    """
    path = folder / _MODULES
    if not path.exists():
        return [Module("Transformer", "")]
    listed = read_json(path)
    found = listed if isinstance(listed, list) else []
    if not found or not all(isinstance(one, dict) and {"type", "path"} <= one.keys() for one in found):
        raise UnsupportedModel(f"{name!r}: {_MODULES} is not a list of modules with type and path", hint=_PLAIN)
    return [_module(one, name) for one in found]


def refuse_unsafe_base(folder: Path, name: str) -> None:
    """Raise ModelError if loading the folder with transformers would load more than its own safetensors."""
    config = _json(folder / _CONFIG)
    if "configuration_files" in config:
        raise UnsupportedModel(
            f"{name!r}: {_CONFIG} sets configuration_files, so transformers would load another file instead",
            hint=f"Give a copy of the folder with the wanted configuration as {_CONFIG}, without that key.",
        )
    weight_files(folder, name)
    if (folder / ADAPTER).exists():
        raise UnsupportedModel(
            f"{name!r} holds {ADAPTER}: transformers would load that adapter too if PEFT is installed",
            hint=f"Merge the adapter into the weights (PEFT's merge_and_unload), or remove {ADAPTER}.",
        )
    if any(_DISTRIBUTED.fullmatch(file.name) for file in folder.glob("shard-*")):
        raise ModelError(
            f"{name!r} holds a distributed checkpoint (shard-*.safetensors); expected {WEIGHTS} or {INDEX}",
            hint="Save the model with save_pretrained in one process, and give that folder.",
        )
    _refuse_kernels(config, name, _CONFIG)


def refuse_unsafe_encoder(folder: Path, name: str) -> None:
    """Raise ModelError if loading the folder with sentence-transformers would run code or open a pickle."""
    kind = _json(folder / "config_sentence_transformers.json").get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise UnsupportedModel(
            f"{name!r} is a {kind}; expected a SentenceTransformer",
            hint="Give another encoder, or let the base encode:  encoder=base",
        )
    for module in modules_of(folder, name):
        inner = folder / module.path
        if lacking := [file.relative_to(folder) for file in module.weight_files(folder, name) if not file.exists()]:
            raise ModelError(
                f"{name!r} cannot be loaded as a sentence encoder: it has no {lacking[0]}, and mta reads no "
                "weights of other formats",
                hint="Save it again with SentenceTransformer.save, or let the base encode:  encoder=base",
            )
        if module.kind == "Transformer":
            refuse_unsafe_base(inner, name)
            _refuse_quantized(_json(inner / _CONFIG), name)
            for file in _settings_of(inner):
                _refuse_settings(_json(file), name, file.name)
        if module.kind == "Dense":
            _refuse_activation(_json(inner / _CONFIG), name)


def lowers_case(folder: Path) -> bool:
    """Return whether a Transformer module in ``folder`` adds lowercasing to its tokenizer."""
    return any(_json(file).get("do_lower_case") for file in _settings_of(folder))


@contextmanager
def loading(name: str, what: str, hint: str) -> Iterator[None]:
    """Raise errors of libraries in the block as ModelError, unless memory ran out. transformers raises many types."""
    try:
        yield
    except MtaError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise UnsupportedModel(
                f"{name!r} needs Python code from its own folder, which mta never runs", hint=_PLAIN
            ) from error
        first = next(iter(str(error).splitlines()), type(error).__name__)
        if "scaled_dot_product_attention" in first:
            raise UnsupportedModel(
                f"{name!r} is a {first.split()[0]}, which does not use torch's scaled_dot_product_attention",
                hint="Give a base of ordinary attention layers, such as Llama, Mistral, Qwen, Gemma 3 or GPT-2.",
            ) from error
        raise ModelError(f"{name!r} cannot be loaded as {what}: {first}", hint) from error


def _settings_of(folder: Path) -> list[Path]:
    """Return the files from which a Transformer module may read its settings."""
    return [file for file in folder.glob("*.json") if _ENCODER_SETTINGS.fullmatch(file.name)]


def _module(listed: dict[str, Any], name: str) -> Module:
    kind, path = str(listed["type"]), str(listed["path"])
    package, _, last = kind.rpartition(".")
    if package.partition(".")[0] != "sentence_transformers" or last not in _MODULE_KINDS:
        raise UnsupportedModel(
            f"{name!r}: {_MODULES} names a module of type {kind!r}; expected one of {', '.join(_MODULE_KINDS)} of "
            "sentence_transformers",
            hint=_PLAIN,
        )
    if not _is_inside(path):
        raise UnsupportedModel(
            f"{name!r}: {_MODULES} names a module at {path!r}; expected a folder inside", hint=_PLAIN
        )
    return Module(last, path)


def _refuse_settings(settings: dict[str, Any], name: str, file: str) -> None:
    for key, value in settings.items():
        inner = value if isinstance(value, dict) else {}
        strange = sorted(set(inner) - _HARMLESS) if key in _KEYWORDS else []
        if strange or (key in _KEYWORDS and not isinstance(value, dict)) or key not in _SETTINGS | _KEYWORDS:
            named = f"{key}.{strange[0]}" if strange else key
            raise UnsupportedModel(f"{name!r}: {file} sets {named}, which may load more than this folder", hint=_PLAIN)
    _refuse_kernels(settings, name, file)


def _refuse_activation(config: dict[str, Any], name: str) -> None:
    activation = str(config.get("activation_function", "torch.nn."))
    if not activation.startswith("torch.nn."):
        raise UnsupportedModel(
            f"{name!r}: a Dense module names {activation!r} as its activation; expected a class of torch.nn",
            hint=_PLAIN,
        )


def _refuse_kernels(config: dict[str, Any], name: str, file: str) -> None:
    """Refuse implementations for which transformers would run code from the hub, such as ``owner/name``."""
    for key, value in _items(config):
        for kind, known in _IMPLEMENTATIONS.items():
            if key.removesuffix("_internal").endswith(kind) and value is not None and value not in known:
                raise UnsupportedModel(
                    f"{name!r}: {file} sets {key} {reprlib.repr(value)}; expected {' or '.join(known)}, because "
                    "other values may load code from the hub",
                    hint=f"Give a copy of the folder without {key} in {file}.",
                )


def _refuse_quantized(config: dict[str, Any], name: str) -> None:
    if any(key == "quantization_config" and value is not None for key, value in _items(config)):
        raise UnsupportedModel(
            f"{name!r} is quantized; expected plain weights",
            hint="Give an encoder that is not quantized, or let the base encode:  encoder=base",
        )


def _items(value: object) -> Iterator[tuple[str, object]]:
    """Yield all keys and values in a JSON value, including nested ones."""
    if isinstance(value, dict):
        yield from value.items()
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for nested in inside:
        yield from _items(nested)


def _safetensors(file: object, name: str, endings: tuple[str, ...] = (".safetensors",)) -> str:
    """Return ``file`` if it is the path of a safetensors file inside the folder, else raise ModelError."""
    if isinstance(file, str) and _is_inside(file) and file.endswith(endings):
        return file
    raise ModelError(
        f"{name!r} names {reprlib.repr(file)} as its weights; expected safetensors of its own folder", hint=_PLAIN
    )


def _is_inside(path: str) -> bool:
    """Return whether a path is relative, stays in its folder, and is no pattern (the hub's client takes patterns)."""
    parts = PurePosixPath(path)
    return not parts.is_absolute() and ".." not in parts.parts and not set(path) & set("\\*?[")


def _json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is none, which is reported when the model is loaded."""
    found = read_json(path)
    return found if isinstance(found, dict) else {}
