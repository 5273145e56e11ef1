"""Tiny random models of real architectures and a tokenizer made on the spot: for unit tests only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from functools import cache, partial
from pathlib import Path
from types import MethodType
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mta.data.tasks.prompt import Example
from mta.kernels import compile
from mta.lora.batch import Factors, LoraBatch
from mta.lora.layers import applied
from mta.model.base import BaseModel
from mta.system.atomic import write_json
from mta.training.packing import Rows, collate, tree


def without_kernels(*families):
    """Within the block, the kernels of these families, or all, are off."""
    off, known = families or compile.FAMILIES, compile._library()
    tables = {key: table for key, table in known.tables.items() if key[0] not in off}
    return mock.patch.object(compile, "_library", partial(known._replace, tables=tables))


TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@cache
def tokenizer(template: bool = True) -> PreTrainedTokenizerFast:
    """Bytes as tokens, with a chat template or without."""
    specials = ["<|pad|>", "<|start|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(specials + alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=["<|start|>"]
    )
    made.chat_template = TEMPLATE if template else None
    return made


COMMON = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_base(folder: Path) -> Path:
    """Save a tiny Llama and its tokenizer as a folder that loads like any other."""
    base_of("llama", torch.float32).model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, num_key_value_heads=2)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**COMMON, num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=8)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **COMMON,
            num_key_value_heads=2,
            head_dim=4,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=4,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=260,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
}


def _rms_norm(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """transformers' norms go through float32 whatever the dtype, which would hide errors below 1e-8."""
    eps = getattr(self, "variance_epsilon", None) or self.eps
    weight = 1 + self.weight if type(self).__name__.startswith("Gemma") else self.weight
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def base_of(kind: str = "llama", dtype: torch.dtype = torch.float64, template: bool = True) -> BaseModel:
    """A random base of that architecture; the same every time, but a copy: what a test changes stays its own."""
    made = copy(_kept_base(kind, dtype, template))
    made.model, made.prompts = deepcopy(made.model), copy(made.prompts)
    torch.manual_seed(0)
    return made


def new_base(kind: str = "llama", dtype: torch.dtype = torch.float64, template: bool = True) -> BaseModel:
    """The same, prepared anew: the checks of a base take ten times as long as a copy."""
    torch.manual_seed(0)
    model = KINDS[kind]().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # far from linear, so that a wrong mask or position shows
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = MethodType(_rms_norm, module)
    return BaseModel(model, tokenizer(template), f"tiny-{kind}")


_kept_base = cache(new_base)


def endless(base: BaseModel, token: int = 259) -> BaseModel:
    """The base without a token that ends an answer early: the tiny model's would mostly be empty.

    A prompt ends with ``token``; 260 is none of the model's.
    """
    base.prompts.end_token = token
    base.model.generation_config.eos_token_id = None
    return base


def unpacked(base: BaseModel) -> BaseModel:
    """The same base, with one example in each row."""
    other = copy(base)
    other.blocked = other.packable = False
    return other


def random_loras(
    base: BaseModel, count: int, rank: int = 3, seed: int = 0, scale: float = 0.5, size: float = 0.3
) -> LoraBatch:
    """Adapters with both factors random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return size * torch.randn(shape, generator=generator, dtype=torch.float64).to(base.master_dtype)

    return LoraBatch(
        {name: Factors(normal(count, rank, d), normal(count, o, rank)) for name, (d, o) in base.targets.items()}, scale
    )


def random_examples(count: int, seed: int, prefix: int = 6, longest: int = 12) -> list[Example]:
    """Examples that share a prefix and differ in length."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 259, (n,), generator=generator).tolist())

    head = draw(prefix)
    made = []
    for _ in range(count):
        middle = draw(int(torch.randint(1, longest, (1,), generator=generator)))
        target = draw(int(torch.randint(1, 4, (1,), generator=generator)))
        made.append(Example(head + middle + target, len(head + middle)))
    return made


def rows_of(sizes: Sequence[int], longest: int = 12) -> Rows:
    """One packed row for each size: that many examples with a common prefix."""
    made = [random_examples(size, seed, longest=longest) for seed, size in enumerate(sizes)]
    return collate([tree(examples, range(len(examples))) for examples in made], 0, torch.device("cpu"))


def save_encoder(folder: Path, modules: Sequence[Mapping[str, str]] = ()) -> Path:
    """A tiny sentence-transformers folder: BERT, mean pooling, and ``modules`` after them."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    counted(BertModel(BertConfig(vocab_size=260, **sizes))).save_pretrained(folder)
    tokenizer(False).save_pretrained(folder)
    kind = "sentence_transformers.models"
    first = [{"path": "", "type": f"{kind}.Transformer"}, {"path": "1_Pooling", "type": f"{kind}.Pooling"}]
    listed = [{"idx": n, "name": str(n), **module} for n, module in enumerate([*first, *modules])]
    write_json(folder / "modules.json", listed)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False})
    return folder


def counted(model: torch.nn.Module) -> torch.nn.Module:
    """The model with weights that no version of torch draws differently, for fingerprints that are pinned."""
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            weight.copy_((torch.arange(weight.numel()) % 7 - 3).reshape(weight.shape) / 8)
    return model


def changed_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON file, which is created where it is missing."""
    write_json(path, (json.loads(path.read_text()) if path.exists() else {}) | changes)


@torch.no_grad()
def greedy(base, prompt, owner, adapters, count):
    """The most likely token again and again, over the whole text each time: no batch, no padding, no cache, no slot."""
    tokens = list(prompt)
    with applied(base.model, adapters, torch.tensor([owner])):
        for _ in range(count):
            tokens.append(int(base.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
