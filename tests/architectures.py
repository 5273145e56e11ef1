"""Tiny random models of every causal language model of the installed transformers, built from their configurations."""

from __future__ import annotations

from typing import Any

import torch
from tiny import tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mta.model.adaptable import compute_experts_plainly
from mta.model.base import BaseModel
from mta.system.model_files import loading

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "unpadded_vocab_size": 260,
    "vocab_size_per_layer_input": 260,
    "shape_vocab_size": 60,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "embedding_dim": 32,
    "d_model": 32,
    "n_embd": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48,
    "dense_intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "ffn_dim": 48,
    "dff": 48,
    "d_inner": 48,
    "d_head": 8,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "sliding_window": 5,
    "sliding_window_size": 5,
    "attention_window_size": 5,
    "window_size": 5,
    "attention_chunk_size": 5,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "zero_expert_num": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 12,  # in multi-head latent attention, values may be wider or narrower than queries
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 64,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "time_step_rank": 4,
    "chunk_size": 8,
    "block_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"head_dim": 4, "num_key_value_heads": 4}  # multi-head latent attention
OWN: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "cohere_compass_text": {"rope_parameters": None},
    "deepseek_v2": LATENT | {"topk_group": 1, "num_experts_per_tok": 2, "n_group": 1},
    "deepseek_v3": LATENT | {"first_k_dense_replace": 1},
    "deepseek_v32": LATENT,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "bamba": {"attn_layer_indices": [1], "mamba_n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "longcat_flash": LATENT,
    "youtu": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
        "mamba_n_groups": 1,
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "minicpm3": LATENT,
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "feed_forward_size": 48,
        "attention_head_size": 8,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba": {"layer_types": None, "layers_block_type": ["hybrid", "linear_attention"]},
    "gemma4_text": {"global_head_dim": 8},
    "gemma4_unified_text": {"global_head_dim": 8},
    "gemma4": {"text_config": {"global_head_dim": 8}},
    "gemma4_unified": {"text_config": {"global_head_dim": 8}},
    "gemma3": {"vision_config": {"image_size": 56}},
    "gemma3n_text": {"num_kv_shared_layers": 0, "pad_token_id": None},
    "sarvam_mla": LATENT,
    "xmod": {"default_language": "en_XX"},
}


def base_of(kind: str, dtype: torch.dtype = torch.float64) -> BaseModel:
    """A random base of that type, the same every time. Raises UnsupportedModel."""
    torch.manual_seed(0)
    with loading(kind, "a causal language model", "Take another kind."):
        config = _shrunk(CONFIG_MAPPING[kind], OWN.get(kind, {}))
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)
    if dtype == torch.float64:
        compute_experts_plainly(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)  # far from linear, so that a wrong mask or position shows
    return BaseModel(model, tokenizer(), f"tiny-{kind}")


def _shrunk(make: Any, own: dict[str, Any]) -> Any:
    default = make()
    parts = [name for name in ("text_config", "vision_config") if getattr(default, name, None) is not None]
    if "text_config" in parts:
        return make(**{name: _shrunk(type(getattr(default, name)), own.get(name, {})).to_dict() for name in parts})
    sizes = {name: value for name, value in SIZES.items() if _takes(default, name)}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if kinds and _takes(default, "layer_types"):
        kinds = kinds * 2 if len(kinds) == 1 else kinds
        sizes |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    return make(**sizes | own)


def _takes(config: Any, name: str) -> bool:
    name = type(config).attribute_map.get(name, name)
    if isinstance(getattr(type(config), name, None), property):
        return False
    try:
        return getattr(config, name, None) is not None
    except Exception:  # it has one for each layer
        return True
