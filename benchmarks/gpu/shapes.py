"""Models in the shapes of well-known ones, with random weights made on the device: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.speed.training import ANCHORS, K
from mta.data.tasks.prompt import Example
from mta.model.base import BaseModel
from mta.personalize.shots import ShotsJob

PEOPLE = 32  # in a cohort
LONGEST = 1024  # tokens of one example
_FIRST = 10  # smaller numbers are special tokens
_BYTES = {torch.bfloat16: 2, torch.float32: 4}


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder. ``kind`` is the class in transformers, without Config and ForCausalLM."""

    name: str
    kind: str
    hidden: int
    layers: int
    heads: int
    keys: int  # heads of keys and values
    inner: int
    vocabulary: int
    head: int = 64
    tied: bool = True

    @property
    def parameters(self) -> int:
        """Number of weights, norms left out."""
        attention = self.hidden * self.head * (2 * self.heads + 2 * self.keys)
        head = self.hidden * self.vocabulary * (1 if self.tied else 2)
        return self.layers * (attention + 3 * self.hidden * self.inner) + head

    def tiny(self) -> Shape:
        """The same kind with two small layers, for a rehearsal on any machine."""
        return replace(self, hidden=64, layers=2, heads=4, keys=2, inner=96, vocabulary=512, head=16)

    def model(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The model as transformers makes it, always with the same random weights on the same device."""
        import transformers

        config = getattr(transformers, f"{self.kind}Config")(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.keys,
            head_dim=self.head,
            intermediate_size=self.inner,
            vocab_size=self.vocabulary,
            max_position_embeddings=2 * LONGEST,
            tie_word_embeddings=self.tied,
            initializer_range=0.48 / self.hidden**0.5,  # larger weights would amplify rounding from layer to layer
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        torch.manual_seed(0)
        with torch.device(device):
            made = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        return made.eval()

    def base(
        self, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False, nf4: bool = False
    ) -> BaseModel:
        """The same as ``mta`` computes with it; ``nf4`` stores linear layers in 4 bits."""
        model = self.model(device, dtype)
        if nf4:
            _in_four_bits(model, device, dtype)
        return BaseModel(model, _tokenizer(), self.name, "random weights", LONGEST, gradient_checkpointing)


SHAPES = (  # in the order of measuring: should the time run out, the largest is there
    Shape("SmolLM2-135M", "Llama", 576, 30, 9, 3, 1536, 49152),
    Shape("Llama-3-8B", "Llama", 4096, 32, 32, 8, 14336, 128256, head=128, tied=False),
    Shape("Llama-3.2-1B", "Llama", 2048, 16, 32, 8, 8192, 128256),
    Shape("Qwen3-4B", "Qwen3", 2560, 36, 32, 8, 9728, 151936, head=128),
)


def _in_four_bits(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Replace the linear layers below the head by layers of bitsandbytes, one by one."""
    for parent in [parent for parent in model.model.modules() if torch.nn.Linear in map(type, parent.children())]:
        for name in [name for name, child in parent.named_children() if type(child) is torch.nn.Linear]:
            setattr(parent, name, _four_bits(parent.get_submodule(name), dtype).to(device))


def _four_bits(layer: Any, dtype: torch.dtype) -> Any:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    sizes = layer.in_features, layer.out_features, layer.bias is not None
    made: Any = Linear4bit(*sizes, dtype, quant_type="nf4", device="meta")  # type: ignore[no-untyped-call]  # draws none
    made.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    made.bias = layer.bias
    return made


def needed(shape: Shape, dtype: torch.dtype, memory: int, people: int = PEOPLE) -> int:
    """Bytes that the rows of a shape take: our weights, the peer's, a bank, merges, and ``memory`` for passes.

    The bank has 50 LoRAs of rank 8; the merge of each of the ``people`` has K of them.
    """
    width = shape.layers * (shape.hidden * 2 + shape.head * 2 * (shape.heads + shape.keys) + 3 * shape.inner)
    width += shape.layers * 5 * shape.hidden  # roughly D + O of all linear layers
    adapters = 8 * (ANCHORS + K * people) * width
    return _BYTES[dtype] * (2 * shape.parameters + adapters) + memory + 4 * 2**30


def jobs_of(shape: Shape, people: int, examples: int, tokens: int, shared: int, targets: int = 2) -> list[ShotsJob]:
    """People with random examples of ``tokens`` tokens, of which the first ``shared`` are equal, as prompts begin."""
    draw = torch.Generator().manual_seed(0)

    def random(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(_FIRST, min(shape.vocabulary, 250), (count,), generator=draw).tolist())

    prefix = random(shared)
    start = tokens - targets
    return [
        ShotsJob(f"person-{n}", [Example(prefix + random(tokens - shared), start) for _ in range(examples)])
        for n in range(people)
    ]


def prompts_of(shape: Shape, people: int, tokens: int) -> list[tuple[int, ...]]:
    """A random prompt for each person."""
    return [job.examples[0].prompt for job in jobs_of(shape, people, 1, tokens + 2, 0)]


def _tokenizer() -> Any:
    """Bytes as tokens: the benchmark needs no words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<start>", "<end>"]
    vocabulary = {token: n for n, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<start>", eos_token="<end>")
