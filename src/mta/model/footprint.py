"""Estimate the tensor memory of a pass through a base from the shapes of its modules.

For every token, a training pass keeps the inputs of norms and of linear layers, the queries, keys, values, and
attention weights, and the inputs of activation functions for the backward pass. A target token adds a row of logits and
their gradient. An adapter adds the copies that the layers make of its factors. A scoring pass holds only one layer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from posixpath import commonpath, dirname
from typing import Any

from torch import nn

from mta.kernels.linear import bits_of

COPIES = 6  # of a trained number: value, gradient, two moments, a checkpoint being written, the result
_BLOCK = 4  # a block of attention has about 4 * sqrt(prefix) tokens, or one branch (mta.model.tree_attention)
_PYTHON_GELU = 3  # intermediate results, each of the size of the input, that a GELU written in Python keeps
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk")  # names of a token's number of experts


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Number of parameters in the adapters of a pass."""

    trained: int = 0  # per person
    frozen: int = 0  # per person: the merge
    task_lora: int = 0  # the task LoRA, stored once; layers with adapters per person copy it for each person
    shared: int = 0  # a gated bank, copied once per pass
    gated: int = 0  # of ``shared``, if a pass computes gradients of the gates


@dataclass(frozen=True, slots=True)
class TextLengths:
    """Lengths that determine the memory of attention: tokens of the longest text and of the shared prefix."""

    longest: int = 0
    prefix: int = 0

    @property
    def block(self) -> int:
        """Tokens of a block in ``mta.model.tree_attention``: one branch, or several with a long prefix."""
        return min(self.longest, max(self.longest - self.prefix, int(_BLOCK * math.sqrt(self.prefix))))

    @property
    def seen(self) -> int:
        """Keys of a block: the prefix and the block itself."""
        return self.prefix + self.block

    @property
    def repeats(self) -> float:
        """Number of times that a token's key and value are gathered."""
        return self.seen / self.block if self.block else 1.0


@dataclass(slots=True)
class LayerTotals:
    """Numbers per token, summed over all layers of a base."""

    norms: int = 0  # inputs of norms
    cast: int = 0  # of these, the ones that norms in Python convert to float32
    linear: int = 0  # distinct inputs of linear layers
    queries: int = 0
    keys: int = 0  # and values
    inner: int = 0  # inputs of activation functions
    outer: int = 0  # outputs of activation functions
    python: int = 0  # intermediate results of activation functions without a kernel
    width: int = 0  # D + O of adapted layers
    outputs: int = 0  # O of adapted layers
    adapted: int = 0  # adapted layers
    routed: int = 0  # inputs (and outputs) of the experts of a token
    experts: int = 0  # weights of the experts of a token

    @classmethod
    def of(cls, model: Any, adapted: Mapping[str, tuple[int, int]], exchanged: Collection[str] = ()) -> LayerTotals:
        """Return the sums of the modules that a text goes through; ``adapted`` are its linear layers: name -> (D, O).

        ``exchanged`` are classes that compute with kernels (``use_kernels``). Assumes that all linear layers of one
        module except the last share their input.
        """
        sums = cls(
            width=sum(map(sum, adapted.values())), outputs=sum(o for _, o in adapted.values()), adapted=len(adapted)
        )
        text = _text_module(model, adapted)
        for path, parent in model.get_submodule(text).named_modules(prefix=text):
            named = sorted(parent.named_children(), key=lambda child: "qkv" not in child[0])  # Phi-3: output first
            shapes = [adapted[layer] for name, _ in named if (layer := f"{path}.{name}".lstrip(".")) in adapted]
            if shapes:
                sums._add(parent, shapes, exchanged)
            elif routed := _routed(parent, model.config.get_text_config()):
                sums._add_experts(parent, *routed)
            elif kind := _norm(parent):
                sums.norms += parent.weight.numel()
                sums.cast += 0 if kind in exchanged or not kind.endswith("RMSNorm") else parent.weight.numel()
        return sums

    def _add(self, parent: Any, shapes: list[tuple[int, int]], exchanged: Collection[str]) -> None:
        inner, (d, _) = sum(o for _, o in shapes[:-1]), shapes[-1]
        self.linear += d + (shapes[0][0] if len(shapes) > 1 else 0)
        if "attention" not in (kind := type(parent).__name__).lower():
            self.inner, self.outer = self.inner + inner, self.outer + d
            self.python += 0 if kind in exchanged else d if inner >= 2 * d else _PYTHON_GELU * inner
            return
        self.queries, self.keys = self.queries + d, self.keys + inner - d
        for name, norm in parent.named_children():
            if _norm(norm):  # applied per head, but `of` counts the norm as one head
                self.norms += (d if name.startswith("q") else (inner - d) // 2) - int(norm.weight.numel())

    def _add_experts(self, parent: nn.Module, hidden: int, inner: int, count: int) -> None:
        """Add ``count`` experts of a token, computed in Python; ``hidden`` and ``inner`` are the sums of their sizes.

        They keep the gate, its activation, the other factor, and the outputs.
        """
        gated = hasattr(parent, "gate_up_proj")
        self.routed += hidden
        self.experts += (2 + gated) * hidden * inner // count
        self.inner, self.outer = self.inner + (1 + gated) * inner, self.outer + (1 + gated) * inner
        self.python += gated * inner


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of passes through one base, in bytes. ``kernels``: whether compiled kernels support its dtype."""

    sums: LayerTotals
    layers: int
    heads: int
    hidden: int
    vocabulary: int
    itemsize: int
    kernels: bool = False
    checkpointed: bool = False
    restored: int = 0  # bytes of the largest layer's weights, if weights are quantized
    capped: bool = False  # whether the base bounds its logits by a tanh

    @classmethod
    def of(
        cls, model: Any, itemsize: int, adapted: Mapping[str, tuple[int, int]], exchanged: Collection[str] = ()
    ) -> Footprint:
        """Return the footprint of a transformers model, which may be on the meta device.

        ``adapted`` are its adapted layers: modules that no pass of a text calls, such as encoders of images, have none.
        """
        config = model.config.get_text_config()
        shape = config.num_hidden_layers, config.num_attention_heads, config.hidden_size, config.vocab_size
        capped = getattr(config, "final_logit_softcapping", None) is not None
        restored = itemsize * any(map(bits_of, model.modules())) * max(d * o for d, o in adapted.values())
        return cls(LayerTotals.of(model, adapted, exchanged), *shape, itemsize, capped=capped, restored=restored)

    @property
    def _wide(self) -> int:
        """Bytes of an accumulated number: float32, or float64 for a base in float64."""
        return max(self.itemsize, 4)

    @property
    def _half(self) -> bool:
        """Whether torch's operations convert the base's numbers to float32 and back."""
        return self.itemsize < self._wide

    @property
    def _weight(self) -> int:
        """Bytes kept for one attention weight."""
        return self.itemsize if self.kernels else self._wide + self._half * self.itemsize

    @property
    def target(self) -> int:
        """Bytes of a training pass for one target token: logits, log-probabilities, gradient, and a tanh if any."""
        return self.vocabulary * (3 + self.capped) * self._wide

    @property
    def target_weight(self) -> float:
        """Memory of a target token divided by that of a token without attention, an upper bound.

        A multiple of 1/256, so that sums are exact in any order.
        """
        return math.ceil(256 * self.target / self.token(TextLengths())) / 256

    def token(self, texts: TextLengths, ranks: int = 0) -> int:
        """Return the bytes that a training pass keeps for one token. ``ranks``: total rank of a person's adapters."""
        s = self.sums
        kept = self.itemsize * (s.norms + s.linear + s.inner + s.python + s.routed + s.queries)
        kept += self.itemsize * int(s.keys * texts.repeats)
        kept += (self._wide - self.itemsize) * s.cast + self._wide * s.adapted * ranks
        kept += self._weight * self.heads * self.layers * texts.seen
        if self.checkpointed:
            return kept // self.layers + self.itemsize * self.hidden * self.layers
        return kept

    def gate_token(self, texts: TextLengths, numbers: ParameterCounts) -> int:
        """Return the bytes that a pass with gradients of gates keeps for one token.

        It keeps x A' of all ranks in each layer, but not the inputs x of linear layers.
        """
        ranks = numbers.gated // self.sums.width
        kept = self.itemsize * (self.sums.adapted * ranks - self.sums.linear)
        return self.token(texts) + (kept // self.layers if self.checkpointed else kept)

    def person(self, numbers: ParameterCounts) -> int:
        """Return the bytes of the copies that a training pass makes of one person's adapters."""
        outputs, joined = numbers.trained * self.sums.outputs // self.sums.width, self._joined(numbers)
        saved = numbers.trained + joined if joined else outputs
        copies = saved // self.layers if self.checkpointed else saved
        copies += outputs + (joined if numbers.frozen else 0) + self._half * numbers.trained
        return self.itemsize * copies

    def ranks(self, numbers: ParameterCounts) -> int:
        """Return the total rank that layers compute for each person."""
        return (numbers.trained + self._joined(numbers)) // self.sums.width

    @staticmethod
    def _joined(numbers: ParameterCounts) -> int:
        """Return the frozen numbers that layers copy for each person; with gates, the task LoRA joins the bank."""
        return numbers.frozen + (numbers.task_lora if numbers.frozen or not numbers.shared else 0)

    def shared(self, numbers: ParameterCounts) -> int:
        """Return the bytes of a pass for all people together: copies of shared adapters, and restored weights."""
        return self.restored + self.itemsize * (numbers.shared + numbers.task_lora)

    def training(self, tokens: int, targets: int, people: int, texts: TextLengths, numbers: ParameterCounts) -> int:
        """Return the peak bytes of a training pass of padded ``tokens``, without the parameters and their moments.

        ``plan_cohorts`` adds up the same parts for cohorts of people; tests compare this sum with what passes take.
        """
        kept = tokens * self.token(texts, self.ranks(numbers)) + people * self.person(numbers) + self.shared(numbers)
        layer = (self.sums.inner + 2 * self.sums.routed) // self.layers + 2 * self.hidden
        return kept + max(targets * self.target, tokens * self.itemsize * layer)  # gradients

    def scoring(self, tokens: int, targets: int, people: int, texts: TextLengths, numbers: ParameterCounts) -> int:
        """Return the peak bytes of a pass without gradients: in the attention or MLP of one layer, or in the logits."""
        s = self.sums
        gathered = (4 if self.kernels else 5) * s.queries + int(s.keys * (1 + texts.repeats))
        attention = 3 * self.hidden + gathered // self.layers
        mlp = 4 * self.hidden + (s.inner + max(s.outer, s.python) + s.routed) // self.layers
        weights = self.heads * texts.seen * (self._weight + (not self.kernels) * self.itemsize)
        masks = texts.seen * (self.itemsize + 1)
        held = tokens * (max(self.itemsize * attention + weights, self.itemsize * mlp) + masks)
        factors = self.itemsize * (numbers.trained + self._joined(numbers))
        return max(held, targets * self.vocabulary * 2 * self._wide) + people * factors + self.shared(numbers)


def _text_module(model: Any, adapted: Iterable[str]) -> str:
    """Return the name of the module around all layers of text, without encoders of images; "" for the whole model."""
    path = commonpath([name.replace(".", "/") for name in adapted])  # such as model/language_model/layers

    def is_list(path: str) -> bool:
        return isinstance(model.get_submodule(path.replace("/", ".")), nn.ModuleList)

    while path and (is_list(path) or is_list(dirname(path))):
        path = dirname(path)
    return path.replace("/", ".")


def _norm(module: nn.Module) -> str:
    """Return the class name of a norm with weights, else ""."""
    kind = type(module).__name__
    return kind if kind.endswith("Norm") and getattr(module, "weight", None) is not None else ""


def _routed(module: nn.Module, config: Any) -> tuple[int, int, int] | None:
    """Return the inputs of a token's experts, those of their last layers, and how many they are; else None.

    Experts are stored as one parameter of three dimensions per layer, not as linear layers. A module whose forward has
    no argument for the chosen experts computes all of them.
    """
    last = getattr(module, "down_proj", None)
    if not isinstance(last, nn.Parameter) or last.ndim != 3:
        return None
    given = any(name.startswith("top_k") for name in inspect.signature(type(module).forward).parameters)
    counts = [getattr(config, name, None) for name in _CHOSEN] if given else []
    experts = next((count for count in counts if isinstance(count, int)), len(last))
    hidden = config.hidden_size
    return experts * hidden, experts * (last[0].numel() // hidden), experts
