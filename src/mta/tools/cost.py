"""Estimate bytes, memory, and hours of a fleet before it is built, from a base's shapes. No weights are loaded.

Operations are multiplications and additions of the linear layers, the LM head, and the adapters. Attention, norms, and
the optimizer are included in the assumed share of the processor's peak rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mta.config import Run, Training
from mta.errors import ConfigError
from mta.model.adaptable import is_linear, shape_of
from mta.model.footprint import COPIES, Footprint, Numbers, Texts
from mta.personalize.merge import needs_evidence
from mta.system.assets import ASSETS, resolve
from mta.system.device import cores, gemm_rate, pick_dtype, processor

_LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
KNOWN: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA
    | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
    "llama-3-70b": _LLAMA
    | {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8},
    "llama-2-7b": _LLAMA
    | {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32},
    "qwen2.5-7b": {"model_type": "qwen2", "tie_word_embeddings": False}
    | {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4},
    "smollm2-135m-instruct": _LLAMA
    | {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
}
STORED = 4  # bytes of a number in bank, states, and training: float32
SERVED = 2  # bytes of a number in serving: bfloat16


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a base.

    ``linear`` is the sum of D * O over adapted layers, ``width`` the sum of D + O, ``head`` the LM head's D * V,
    ``cached`` the numbers in the KV cache per token.
    """

    name: str
    parameters: int
    linear: int
    width: int
    layers: int
    head: int
    cached: int
    footprint: Footprint  # of passes in bfloat16, without compiled kernels

    @classmethod
    def of(cls, name: str) -> Shape:
        """Return the sizes of a base in ``KNOWN``, an asset, a local folder, or a hub id. Reads only its config.

        Raises ConfigError.
        """
        from transformers import AutoModelForCausalLM

        config = _config(name)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, attn_implementation="eager")
        except ValueError:
            raise ConfigError(
                f"{name!r} is not a causal language model: {config.model_type}",
                hint=f"Give another --base, such as {next(iter(KNOWN))}.",
            ) from None
        head = model.get_output_embeddings()
        shapes = [shape_of(m) for m in model.modules() if is_linear(m) and m is not head]
        text = config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            name,
            sum(p.numel() for p in model.parameters()),
            sum(d * o for d, o in shapes),
            sum(d + o for d, o in shapes),
            len(shapes),
            text.hidden_size * text.vocab_size,
            2 * text.num_hidden_layers * heads * size,
            Footprint.of(model, itemsize=SERVED),
        )


def _config(name: str) -> Any:
    from transformers import AutoConfig

    if name in KNOWN:
        return AutoConfig.for_model(**KNOWN[name])
    try:
        place = resolve(name) if name in ASSETS or Path(name).exists() else name
        return AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # transformers raises different errors: offline, unknown, gated, no config
        raise ConfigError(
            f"cannot read the shapes of {name!r}: {str(error).splitlines()[0]}",
            hint=f"Give one of {', '.join(KNOWN)}, a folder with a config.json, or a hub id.",
        ) from None


@dataclass(frozen=True, slots=True)
class Load:
    """Sizes of the data: tokens of an item (prompt and target), target tokens among them, and items per person.

    The first ``shared`` tokens (chat template, instruction) are equal for all items and computed once per person.
    """

    tokens: float = 128
    targets: float = 16
    shots: int = 8
    context: int = 1024  # tokens of a served conversation
    shared: float = 0

    def __post_init__(self) -> None:
        if not 0 < self.targets <= self.tokens - self.shared:
            raise ConfigError(
                f"an item of {self.tokens:g} tokens, {self.shared:g} of them shared, has no {self.targets:g} targets",
                hint=f"Target tokens are not shared: give --tokens above {self.shared + self.targets:g}.",
            )

    @property
    def computed(self) -> float:
        """Tokens computed per item."""
        return self.tokens - self.shared + self.shared / self.shots


@dataclass(frozen=True, slots=True)
class Hardware:
    """Operations per second of matrix products, and the share that mta's passes reach. ``source``: source of both."""

    name: str
    rate: float
    share: float
    source: str

    def seconds(self, operations: float) -> float:
        return operations / (self.rate * self.share)


_GPUS = {"l4": 121e12, "a100": 312e12, "h100": 989e12}
_REACHED = 0.6  # of matrix products in bfloat16: make bench, row "operations against torch.mm"


def hardware(name: str) -> Hardware:
    """Return ``this`` machine, measured now, or a GPU by the manufacturer's figures. Raises ConfigError."""
    if name in _GPUS:
        source = "the manufacturer's dense bfloat16 rate; the share is assumed, not measured"
        return Hardware(name, _GPUS[name], 0.35, source)
    if name != "this":
        raise ConfigError(f"no such hardware: {name!r}", hint=f"Give one of: this, {', '.join(_GPUS)}.")
    dtype = pick_dtype("auto", torch.device("cpu"))
    name = str(dtype).removeprefix("torch.")
    source = f"matrix products in {name}, measured now; the share from docs/explanation/performance.md"
    return Hardware(f"{processor()}, {cores()} cores", gemm_rate(dtype), _REACHED, source)


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory in bytes: base and bank in bfloat16, one served row, and one adapter in training (anchor, stack).

    The bank counts twice: for merging and for serving. ``token`` is what a training pass keeps per token, ``target``
    what it adds per target token, as ``memory=`` plans them.
    """

    base: float
    bank: float
    row: float
    anchor: float
    stack: float
    token: float
    target: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of one method: fixed, and for each person."""

    fixed_bytes: float
    person_bytes: float
    fixed_operations: float
    person_operations: float


def costs(shape: Shape, run: Run, load: Load) -> dict[str, Cost]:
    """Return the costs of MTA, the merge alone, OPPU (one LoRA per person, of the anchors' rank), and Per-Pcs.

    Raises ConfigError if ``merge.k`` is larger than the number of anchors.
    """
    anchors, rank = run.bank.anchors, run.bank.lora.rank
    if run.merge.k > anchors:
        raise ConfigError(f"merge.k is {run.merge.k}, but the bank has {anchors} anchors", hint="Lower merge.k.")
    pooled = _pooled(run)
    bank_bytes = (anchors * rank + pooled) * shape.width * STORED
    bank = _bank_operations(shape, run, load)
    k = run.merge.k or anchors
    merge_bytes = 24.0 * k + 640  # anchor and coefficient as text, and the other fields of the file
    stack = run.stack.lora.rank * shape.width * STORED if run.stack.enabled else 0
    seen = load.shots * load.computed
    under = _forward(shape, load, pooled), _forward(shape, load, pooled + k * rank)
    scored = under[1:] if needs_evidence(run.merge) else under  # the evidence includes the pooled model's losses
    merged = _evidence(shape, run, load) + _coefficients(shape, run, load) + seen * sum(scored)
    learned = _examples(run.stack.training, load.shots) * load.computed if run.stack.enabled else 0.0
    stacked = learned * _trained(shape, load, pooled + k * rank, run.stack.lora.rank)
    stacked += run.stack.enabled * seen * _forward(shape, load, pooled + k * rank + run.stack.lora.rank)
    alone = _examples(run.stack.training, load.shots) * load.computed * _trained(shape, load, pooled, rank)
    task = _task_operations(shape, run, load)
    assembly = shape.layers * (5.0 * anchors + 48)  # one weight per anchor, as text
    return {
        "MTA": Cost(bank_bytes, merge_bytes + stack, bank, merged + stacked),
        "merge alone": Cost(bank_bytes, merge_bytes, bank, merged),
        "OPPU": Cost(pooled * shape.width * STORED, rank * shape.width * STORED, task, alone),
        "Per-Pcs": Cost(bank_bytes, assembly, bank, seen * under[0]),
    }


def passes(run: Run, shots: float) -> tuple[float, float]:
    """Return the passes of stages 2 and 3 over a person's shots: forward only, and forward and backward.

    Forward passes: one per anchor if the policy needs the evidence, then those for the losses of the pooled model,
    merge, and stack.
    """
    forward = (run.bank.anchors if needs_evidence(run.merge) else 0) + 2 + run.stack.enabled
    trained = _examples(run.merge.learned, shots) if run.merge.policy == "learned" else 0.0
    trained += _examples(run.stack.training, shots) if run.stack.enabled else 0.0
    return float(forward), trained / shots


def memory(shape: Shape, run: Run, load: Load) -> Memory:
    """Return the memory of base, bank, a served row, and training; ``memory=`` bounds the parts of training."""
    ranks = run.bank.anchors * run.bank.lora.rank + _pooled(run)
    row = SERVED * (shape.cached * load.context + ranks + run.stack.lora.rank * shape.width)
    pooled, footprint = _pooled(run) * shape.width, shape.footprint
    trained = [Numbers(rank * shape.width, pooled=pooled) for rank in (run.bank.lora.rank, run.stack.lora.rank)]
    anchor, stack = (float(COPIES * STORED * numbers.trained + footprint.person(numbers)) for numbers in trained)
    token = footprint.token(Texts(round(load.tokens), round(load.shared)), footprint.ranks(trained[1]))
    base, bank = float(SERVED * shape.parameters), 2.0 * SERVED * ranks * shape.width
    return Memory(base, bank, float(row), anchor, stack, float(token), float(footprint.target))


def _pooled(run: Run) -> int:
    return run.task_lora.lora.rank if run.task_lora.enabled else 0


def _forward(shape: Shape, load: Load, ranks: float) -> float:
    """Return the forward operations per token: layers, adapters of total rank ``ranks``, and LM head at targets."""
    return 2 * (shape.linear + ranks * shape.width + shape.head * load.targets / load.computed)


def _trained(shape: Shape, load: Load, frozen: float, trained: float) -> float:
    """Return the training operations per token: forward, backward to all inputs, and gradients of trained factors."""
    return 2 * _forward(shape, load, frozen + trained) + 2 * trained * shape.width


def _examples(training: Training, items: float) -> float:
    if training.steps is not None:
        return training.steps * min(training.batch_size, items)
    return training.epochs * items


def _task_operations(shape: Shape, run: Run, load: Load) -> float:
    task = run.task_lora
    examples = _examples(task.training, task.items) if task.enabled else 0.0
    return examples * load.computed * _trained(shape, load, 0, task.lora.rank)


def _bank_operations(shape: Shape, run: Run, load: Load) -> float:
    bank, pooled = run.bank, _pooled(run)
    examples = bank.anchors * _examples(bank.training, bank.max_items)
    return _task_operations(shape, run, load) + examples * load.computed * _trained(shape, load, pooled, bank.lora.rank)


def _evidence(shape: Shape, run: Run, load: Load) -> float:
    """Return the operations of scoring shots under every anchor and the pooled model, if the policy needs that."""
    pooled = _pooled(run)
    anchors, rank = run.bank.anchors, run.bank.lora.rank
    under = anchors * _forward(shape, load, pooled + rank) + _forward(shape, load, pooled)
    return load.shots * load.computed * under if needs_evidence(run.merge) else 0.0


def _coefficients(shape: Shape, run: Run, load: Load) -> float:
    if run.merge.policy != "learned":
        return 0.0
    ranks = (run.merge.k or run.bank.anchors) * run.bank.lora.rank
    pooled = _pooled(run)
    return _examples(run.merge.learned, load.shots) * load.computed * 2 * _forward(shape, load, pooled + ranks)
