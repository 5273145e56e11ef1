"""Load a transformers model as a base: read its files, refuse unsupported kinds, and find the layers for LoRA."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from mta.errors import ModelError, UnsupportedModel
from mta.kernels.linear import is_linear
from mta.system.extras import require

log = logging.getLogger("mta")


def longest_text(config: Any, asked: int) -> int:
    """Return how many of the ``asked`` tokens a text may have: at most ``max_position_embeddings``; for longrope, less.

    If one row is longer than the original length, longrope changes the frequencies of all rows of a pass.
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # of all layers, or by layer type
    original = [k.get("original_max_position_embeddings") for k in kinds if k.get("rope_type") == "longrope"]
    longest = min(asked, getattr(config, "max_position_embeddings", None) or asked)
    if (capped := min([longest, *filter(None, original)])) < longest:
        log.warning(
            "texts are cut at %d tokens instead of %d: beyond that length, longrope RoPE would change "
            "the results of short texts in the same batch",
            capped,
            longest,
        )
    return int(capped)


def is_adaptable(module: nn.Module) -> bool:
    """Return whether a module is a linear layer: nn.Linear, plain or quantized, or GPT-2's Conv1D."""
    return is_linear(module) or type(module).__name__ == "Conv1D"


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Return (inputs D, outputs O) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    rows, columns = module.weight.shape  # type: ignore[misc]  # GPT-2's Conv1D stores its weight transposed
    return int(rows), int(columns)


def adapted_layers(model: Any, called: set[nn.Module], name: str) -> dict[str, tuple[int, int]]:
    """Return the ``called`` linear layers except the LM head: name -> (D, O). Raises UnsupportedModel."""
    adapted = called - {model.get_output_embeddings()}
    layers = {layer: shape_of(module) for layer, module in model.named_modules() if module in adapted}
    if not layers:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise UnsupportedModel(
            f"{name!r} has no plain linear layers to adapt; its modules are {', '.join(kinds)}",
            hint="Give a base with nn.Linear or Conv1D layers, such as Llama, Mistral, Qwen, Gemma or GPT-2.",
        )
    return layers


def enable_checkpointing(model: Any, name: str) -> None:
    """Enable gradient checkpointing without dropout. Raises UnsupportedModel."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UnsupportedModel(
            f"{name!r} has no gradient checkpointing", hint="Set gradient_checkpointing=false, and raise memory=…."
        )
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for layer in model.modules():
        for attribute, value in list(vars(layer).items()):
            if hasattr(layer, "gradient_checkpointing") and "drop" in attribute and isinstance(value, float):
                setattr(layer, attribute, 0.0)  # some layers apply dropout themselves in training mode


def quantized_by(config: Any) -> str:
    """Return the method by which a model's stored weights are quantized; "" if they are not.

    Raises UnsupportedModel for methods other than bitsandbytes.
    """
    given = (getattr(one, "quantization_config", None) for one in (config, config.get_text_config()))
    how = next((one for one in given if one is not None), None)
    if how is None:
        return ""
    method = how.get("quant_method") if isinstance(how, dict) else getattr(how, "quant_method", "")
    method = str(getattr(method, "value", method) or "an unknown method")
    if method != "bitsandbytes":
        raise UnsupportedModel(
            f"{getattr(config, 'model_type', '')!r} is quantized by {method}; adapters are trained over plain weights, "
            "or weights that bitsandbytes quantized",
            hint="Load the unquantized model; mta can quantize it:  quantize=nf4",
        )
    return method


def refuse_unsupported(model: Any) -> None:
    """Raise UnsupportedModel for adapted and recurrent models, and for most quantized ones."""
    quantized_by(model.config)
    kind = getattr(model.config, "model_type", type(model).__name__)
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise UnsupportedModel(
            f"{kind!r} has adapters of PEFT already; exports would fit no model",
            hint="Merge them into the weights first:  model = model.merge_and_unload()",
        )
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModel(
            f"{kind!r} carries a recurrent state from token to token; shared prefixes need attention",
            hint="Give a base with attention layers only, such as Llama, Mistral, Qwen or Gemma.",
        )


def load_weights(
    folder: str, config: Any, name: str, dtype: torch.dtype, place: torch.device, quantize: str = "none"
) -> Any:
    """Return the causal language model of a folder on ``place``. ``quantize`` quantizes it as it is read.

    Raises ModelError if weights are missing, MissingExtra.
    """
    from transformers import AutoModelForCausalLM

    more = _quantization(config, dtype, place, quantize)
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **more,
    )
    if missing := sorted(loading["missing_keys"]):  # transformers would use random weights
        raise ModelError(
            f"{name!r} is not a complete causal language model: {len(missing)} weights are not in its files, "
            f"{missing[0]} first",
            hint="Give the folder with all of its *.safetensors, or download the model again.",
        )
    if dtype == torch.float64:
        compute_experts_plainly(model)
    return model if more else model.to(place)


def _quantization(config: Any, dtype: torch.dtype, place: torch.device, quantize: str) -> dict[str, Any]:
    """Return the arguments with which transformers quantizes weights, or reads quantized ones; none for plain ones."""
    if (stored := quantized_by(config)) and quantize != "none":
        raise UnsupportedModel(f"these weights are quantized by {stored} already", hint="Leave quantize out.")
    if quantize not in (kinds := ("none", "nf4", "int8")):
        raise ModelError(f"quantize is {quantize!r}; expected one of {', '.join(kinds)}", hint="Set quantize=nf4.")
    if not stored and quantize == "none":
        return {}
    require("quantize")
    if dtype == torch.float64:
        raise UnsupportedModel("bitsandbytes has no weights for float64", hint="Set dtype=bfloat16 or dtype=float32.")
    if stored:
        return {"device_map": {"": place}}
    from transformers import BitsAndBytesConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    kind = {"load_in_4bit": True, **nf4} if quantize == "nf4" else {"load_in_8bit": True}
    return {"device_map": {"": place}, "quantization_config": BitsAndBytesConfig(**kind)}


def compute_experts_plainly(model: Any) -> None:
    """Compute a model's experts, if it has any, one by one: grouped products take no float64."""
    if getattr(model.config, "_experts_implementation", None):
        model.set_experts_implementation("eager")


def outline_model(folder: str, config: Any, _: str, dtype: torch.dtype) -> Any:
    """Return the causal language model of a folder without weights, on the ``meta`` device; it cannot compute."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )
    with suppress(OSError):  # without that file, the model's configuration gives the end tokens
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
