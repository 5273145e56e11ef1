"""Tensor memory of a pass through a base, from the shapes of its modules alone: nothing is measured.

A training pass keeps for the backward pass, of every token: the inputs of norms and of linear layers, the queries,
keys, values and attention weights, and the inputs of activation functions. A target token adds a row of logits and
their gradient. An adapter adds the copies that the layers make of its factors. A scoring pass holds one layer only.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from mta.model.adaptable import is_linear, shape_of

COPIES = 6  # of a trained number: value, gradient, two moments, a checkpoint being written, the result
_BLOCK = 4  # a block of attention has about 4 * sqrt(prefix) tokens, or one branch (mta.model.tree_attention)
_PYTHON_GELU = 3  # intermediate results of the size of its input that a GELU written in Python keeps


@dataclass(frozen=True, slots=True)
class Numbers:
    """How many numbers the adapters of a pass have.

    ``trained`` and ``frozen`` (a merge of the person's own) are per person. ``pooled`` (the task LoRA) is stored once,
    but layers with adapters per person copy it for each of them. ``shared`` (a bank that gates merge) is copied once
    per pass.
    """

    trained: int = 0
    frozen: int = 0
    pooled: int = 0
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Texts:
    """Lengths that decide what attention takes: tokens of the longest text, and of the prefix its branches share."""

    longest: int = 0
    prefix: int = 0

    @property
    def block(self) -> int:
        """Tokens of a block in ``mta.model.tree_attention``: a branch, or more of them under a long prefix."""
        return min(self.longest, max(self.longest - self.prefix, int(_BLOCK * math.sqrt(self.prefix))))

    @property
    def seen(self) -> int:
        """Keys of a block: the prefix and the block itself."""
        return self.prefix + self.block

    @property
    def repeats(self) -> float:
        """How often a token's key and value are gathered."""
        return self.seen / self.block if self.block else 1.0


@dataclass(slots=True)
class Sums:
    """Numbers per token, summed over all layers of a base.

    ``norms``: inputs of norms. ``cast``: those that norms in Python convert to float32. ``linear``: distinct inputs of
    linear layers. ``queries``, ``keys`` (and values). ``inner`` and ``outer``: inputs and outputs of activation
    functions. ``python``: what those keep besides where no kernel computes them. ``width``: D + O of ``adapted``
    layers. ``outputs``: their O. ``routed``: inputs (and outputs) of experts, of a token once for each of its experts.
    """

    norms: int = 0
    cast: int = 0
    linear: int = 0
    queries: int = 0
    keys: int = 0
    inner: int = 0
    outer: int = 0
    python: int = 0
    width: int = 0
    outputs: int = 0
    adapted: int = 0
    routed: int = 0

    @classmethod
    def of(cls, model: Any, exchanged: Collection[str] = ()) -> Sums:
        """Read the modules of a model. ``exchanged``: classes that compute with kernels (``use_kernels``).

        In a module that holds linear layers, the last one has an input of its own and the others share theirs.
        """
        sums, head = cls(), model.get_output_embeddings()
        for parent in model.modules():
            shapes = [shape_of(child) for child in parent.children() if is_linear(child) and child is not head]
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
        self.width += sum(map(sum, shapes))
        self.outputs += sum(o for _, o in shapes)
        self.adapted += len(shapes)
        if "attention" not in (kind := type(parent).__name__).lower():
            self.inner, self.outer = self.inner + inner, self.outer + d
            self.python += 0 if kind in exchanged else d if inner >= 2 * d else _PYTHON_GELU * inner
            return
        self.queries, self.keys = self.queries + d, self.keys + inner - d
        for name, norm in parent.named_children():
            if _norm(norm):  # of each head: the module itself was counted as one head
                self.norms += (d if name.startswith("q") else (inner - d) // 2) - int(norm.weight.numel())

    def _add_experts(self, parent: nn.Module, hidden: int, inner: int) -> None:
        """Experts in Python: kept are the gate, its activation, what that is multiplied by, and the outputs."""
        gated = hasattr(parent, "gate_up_proj")
        self.routed += hidden
        self.inner, self.outer = self.inner + (1 + gated) * inner, self.outer + (1 + gated) * inner
        self.python += gated * inner


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that passes through one base take. ``kernels``: whether there are compiled kernels for its numbers."""

    sums: Sums
    layers: int
    heads: int
    hidden: int
    vocabulary: int
    itemsize: int
    kernels: bool = False
    checkpointed: bool = False

    @classmethod
    def of(cls, model: Any, exchanged: Collection[str] = (), **how: Any) -> Footprint:
        """Read the shapes of a transformers model, which may be on the meta device. Keywords are further fields."""
        config = model.config.get_text_config()
        shape = config.num_hidden_layers, config.num_attention_heads, config.hidden_size, config.vocab_size
        return cls(Sums.of(model, exchanged), *shape, **how)

    @property
    def _wide(self) -> int:
        """Bytes of a number that is summed: float32, or float64 for a base in float64."""
        return max(self.itemsize, 4)

    @property
    def _half(self) -> bool:
        """Whether torch's own operations convert numbers of the base to float32 and back."""
        return self.itemsize < self._wide

    @property
    def _weight(self) -> int:
        """Bytes kept of one attention weight."""
        return self.itemsize if self.kernels else self._wide + self._half * self.itemsize

    @property
    def target(self) -> int:
        """Bytes that a training pass takes for one target token: logits, log-probabilities and their gradient."""
        return self.vocabulary * (2 * self.itemsize if self.kernels else 3 * self._wide)

    @property
    def target_weight(self) -> float:
        """Cost of a target token in tokens. Tokens count without attention here, which makes it an upper bound.

        A multiple of 1/256: sums of such numbers are exact in any order.
        """
        return math.ceil(256 * self.target / self.token(Texts())) / 256

    def token(self, texts: Texts, ranks: int = 0) -> int:
        """Bytes that a training pass keeps of one token. ``ranks``: of all adapters per person together."""
        s = self.sums
        kept = self.itemsize * (s.norms + s.linear + s.inner + s.python + s.routed + s.queries)
        kept += self.itemsize * int(s.keys * texts.repeats)
        kept += (self._wide - self.itemsize) * s.cast + self._wide * s.adapted * ranks
        kept += self._weight * self.heads * self.layers * texts.seen
        if self.checkpointed:
            return kept // self.layers + self.itemsize * self.hidden * self.layers
        return kept

    def person(self, numbers: Numbers) -> int:
        """Bytes of the copies that a training pass makes of the adapters of one person."""
        outputs, joined = numbers.trained * self.sums.outputs // self.sums.width, self._joined(numbers)
        saved = numbers.trained + joined if joined else outputs
        copies = saved // self.layers if self.checkpointed else saved
        copies += outputs + (joined if numbers.frozen else 0) + self._half * numbers.trained
        return self.itemsize * copies

    def ranks(self, numbers: Numbers) -> int:
        """Sum of the ranks that layers compute for each person."""
        return (numbers.trained + self._joined(numbers)) // self.sums.width

    @staticmethod
    def _joined(numbers: Numbers) -> int:
        """Frozen numbers that layers copy for each person; gates join the task LoRA with the bank instead."""
        return numbers.frozen + (numbers.pooled if numbers.frozen or not numbers.shared else 0)

    def shared(self, numbers: Numbers) -> int:
        """Bytes of the copies that a pass makes of adapters for all people."""
        return self.itemsize * (numbers.shared + numbers.pooled)

    def training(self, tokens: int, targets: int, people: int, texts: Texts, numbers: Numbers) -> int:
        """Peak bytes of a training pass of so many padded tokens, beside the parameters and their moments."""
        kept = tokens * self.token(texts, self.ranks(numbers)) + people * self.person(numbers) + self.shared(numbers)
        layer = (self.sums.inner + 2 * self.sums.routed) // self.layers + 2 * self.hidden
        return kept + max(targets * self.target, tokens * self.itemsize * layer)  # gradients

    def scoring(self, tokens: int, targets: int, people: int, texts: Texts, numbers: Numbers) -> int:
        """Peak bytes of a pass without gradients: of the attention or the MLP of one layer, or of the logits."""
        s = self.sums
        gathered = (4 if self.kernels else 5) * s.queries + int(s.keys * (1 + texts.repeats))
        attention = 3 * self.hidden + gathered // self.layers
        mlp = 4 * self.hidden + (s.inner + max(s.outer, s.python) + s.routed) // self.layers
        weights = self.heads * texts.seen * (self._weight + (not self.kernels) * self.itemsize)
        masks = texts.seen * (self.itemsize + 1)
        logits = self.itemsize if self.kernels else self.itemsize + self._wide + self._half * self._wide
        held = tokens * (max(self.itemsize * attention + weights, self.itemsize * mlp) + masks)
        factors = self.itemsize * (numbers.trained + self._joined(numbers))
        return max(held, targets * self.vocabulary * logits) + people * factors + self.shared(numbers)


def _norm(module: nn.Module) -> str:
    """The class of a norm with weights, else nothing."""
    kind = type(module).__name__
    return kind if kind.endswith("Norm") and getattr(module, "weight", None) is not None else ""


def _routed(module: nn.Module, config: Any) -> tuple[int, int] | None:
    """Numbers that enter all experts of a token together, and that their last layers take; None for other modules.

    Experts are one parameter of three dimensions per layer, and no linear layers. A module that is not given the
    experts of each token computes all of them.
    """
    last = getattr(module, "down_proj", None)
    if not isinstance(last, nn.Parameter) or last.ndim != 3:
        return None
    given = any(name.startswith("top_k") for name in inspect.signature(type(module).forward).parameters)
    count = getattr(config, "num_experts_per_tok", None) if given else None
    experts, hidden = count or len(last), config.hidden_size
    return experts * hidden, experts * (last[0].numel() // hidden)
