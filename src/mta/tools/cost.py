"""Estimate bytes, memory, and hours of a fleet before it is built, from a base's shapes. No weights are loaded.

Operations are multiplications and additions of the linear layers, the LM head, and the adapters. Attention, norms, and
the optimizer are included in the assumed share of the processor's peak rate.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mta.bank.calibration.calibrate import rivals_of
from mta.bank.calibration.crossfit import planned_cost
from mta.bank.calibration.info import CalibrationInfo, Gain, with_calibrated_settings
from mta.config import Run
from mta.config.schema import OPPU_TRAINING
from mta.errors import ConfigError
from mta.model.adaptable import adapted_layers, quantized_by
from mta.model.agreement import called_layers
from mta.model.footprint import COPIES, Footprint, ParameterCounts, TextLengths
from mta.personalize.merge import needs_evidence
from mta.personalize.policies import policy_of
from mta.system.assets import ASSETS, resolve
from mta.system.device import REACHED, cpu, dtype_name, gemm_rate, pick_dtype
from mta.system.process import cores
from mta.system.units import human_bytes

_FIELDS = ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
_FIELDS += ["num_key_value_heads", "tie_word_embeddings"]
_SIZES = {
    "llama-3-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, False),
    "llama-3-70b": ("llama", 128256, 8192, 28672, 80, 64, 8, False),
    "llama-2-7b": ("llama", 32000, 4096, 11008, 32, 32, 32, False),
    "qwen2.5-7b": ("qwen2", 152064, 3584, 18944, 28, 28, 4, False),
    "smollm2-135m-instruct": ("llama", 49152, 576, 1536, 30, 9, 3, True),
}
KNOWN: dict[str, dict[str, Any]] = {name: dict(zip(_FIELDS, sizes)) for name, sizes in _SIZES.items()}
STORED = 4  # bytes of a number in bank, states, and training: float32
SERVED = 2  # bytes of a number in serving: bfloat16
WEIGHT = {"none": SERVED, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1}  # bytes of a linear layer's weight
USABLE = 0.9  # share of a GPU's memory
ON_GPU = 0.35  # share of a GPU's rate that passes are assumed to reach


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
    stored: str = "none"  # how bitsandbytes quantized the stored weights

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
            return cls.of_model(name, model)
        except ValueError:
            kind = "not a causal language model"
        except AttributeError:
            kind = "not a model with attention layers only"
        raise ConfigError(
            f"{name!r} is {kind}: {config.model_type}", hint=f"Give another --base, such as {next(iter(KNOWN))}."
        )

    @classmethod
    def of_model(cls, name: str, model: Any) -> Shape:
        """Return the sizes of a model of transformers."""
        text, adapted = model.config.get_text_config(), adapted_layers(model, called_layers(model), name)
        shapes = adapted.values()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        how = model.config.quantization_config if quantized_by(model.config) else None
        stored = "none" if how is None else "int8" if how.get("load_in_8bit") else "nf4"
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            name,
            sum(p.numel() for p in model.parameters()),
            sum(d * o for d, o in shapes),
            sum(d + o for d, o in shapes),
            len(shapes),
            text.hidden_size * text.vocab_size,
            2 * text.num_hidden_layers * heads * size,
            Footprint.of(model, SERVED, adapted),
            stored,
        )


def _config(name: str) -> Any:
    from transformers import AutoConfig

    if name in KNOWN:
        return AutoConfig.for_model(**KNOWN[name])
    try:
        place = resolve(name) if name in ASSETS or Path(os.path.expanduser(name)).exists() else name
        return AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # transformers raises different errors: offline, unknown, gated, no config
        raise ConfigError(
            f"cannot read the shapes of {name!r}: {str(error).splitlines()[0]}",
            hint=f"Give one of {', '.join(KNOWN)}, a folder with a config.json, or a hub id.",
        ) from None


@dataclass(frozen=True, slots=True)
class DataSizes:
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
    """Operations per second of matrix products, and the share that mta's passes reach. ``source``: source of both.

    ``memory`` in bytes; 0 for this machine.
    """

    name: str
    rate: float
    share: float
    source: str
    memory: float = 0.0

    def seconds(self, operations: float) -> float:
        return operations / (self.rate * self.share)


_GPUS = {"l4": (121e12, 24e9), "rtx-4090": (165e12, 24e9), "a100": (312e12, 80e9), "h100": (989e12, 80e9)}


def hardware(name: str) -> Hardware:
    """Return ``this`` machine, measured now, or a GPU by the manufacturer's figures. Raises ConfigError."""
    if name in _GPUS:
        source = "the manufacturer's dense bfloat16 rate; the share is assumed, not measured"
        rate, memory = _GPUS[name]
        return Hardware(name, rate, ON_GPU, source, memory)
    if name != "this":
        raise ConfigError(f"no such hardware: {name!r}", hint=f"Give one of: this, {', '.join(_GPUS)}.")
    dtype = pick_dtype("auto", torch.device("cpu"))
    name = dtype_name(dtype)
    source = f"matrix products in {name}, measured now; the share from docs/explanation/performance.md"
    return Hardware(f"{cpu()}, {cores()} cores", gemm_rate(dtype), REACHED, source)


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


HELPFUL = CalibrationInfo(
    ridge=1.0, prior=8.0, rate=1.6e-3, gains=(Gain(shots=8, people=8, mean=0.1, low=0.0, high=0.2, worse=0.0),)
)


def planned(run: Run) -> Run:
    """Return a run as it would be with the bank that it builds, if a calibration finds that merge and stack help."""
    return with_calibrated_settings(run, HELPFUL if run.calibration.enabled else None, run.stack.lora)


def costs(shape: Shape, run: Run, data: DataSizes) -> dict[str, Cost]:
    """Return the costs of MTA, the merge alone, and OPPU (one LoRA per person, of the anchors' rank).

    Raises ConfigError if ``merge.k`` is larger than the number of anchors.
    """
    run = planned(run)
    anchors, rank, stack = run.bank.anchors, run.bank.lora.rank, run.stack.lora.rank
    if run.merge.k > anchors:
        raise ConfigError(f"merge.k is {run.merge.k}, but the bank has {anchors} anchors", hint="Lower merge.k.")
    k, task_rank, shots = run.merge.k or anchors, _task_rank(run), data.shots
    merged = task_rank + k * rank
    scored, trained = partial(_scored, shape, data), partial(_trained, shape, data, run.gradient_checkpointing)

    stage_0 = run.task_lora.rounds * run.task_lora.training.examples(run.task_lora.items)  # at most
    task = trained(stage_0, 0, task_rank) if task_rank else 0.0
    how = run.calibration
    tried = planned_cost(
        how, [how.shots] * how.people, how.people * how.queries, run.stack.enabled, len(rivals_of(run))
    )
    tried *= how.enabled
    single = run.bank.first_training.examples(run.bank.max_items)
    several = run.bank.training.examples(run.bank.group_items)
    bank = task + trained(run.bank.first_bank * single, task_rank, rank) + scored(tried, task_rank + anchors * rank)
    if run.bank.choose == "groups":  # full groups; all their items give gradients first
        first = task_rank + run.bank.first_bank * rank
        again = run.bank.rounds * anchors + sum(run.bank.sizes[1:])
        bank += run.bank.rounds * trained(anchors * run.bank.group_items, first, 0)
        bank += trained(again * several, task_rank, rank)
    merge = scored(shots, task_rank)  # losses; a stack's first step has those under the merge
    over = 0.0 if policy_of(run.merge).gradients else scored(shots, merged)  # nothing reads them after a gradient
    if needs_evidence(run.merge):
        merge += anchors * scored(shots, task_rank + rank)
    if training := policy_of(run.merge).learns:
        merge += trained(training(run.merge).examples(shots), merged, 0)
    if policy_of(run.merge).gradients:
        merge += trained(shots, merged, 0)
    examples, adapt = run.stack.training.examples(shots), over
    if run.stack.enabled:
        adapt = trained(examples, merged, stack) + scored(shots, merged + stack)

    number = shape.width * STORED  # bytes of an adapter of rank 1
    bank_bytes = float((anchors * rank + task_rank) * number)
    texts = 24 + 20 * policy_of(run.merge).gradients  # anchor, coefficient, and gradient, as text
    merge_bytes = float(texts * k + 640)  # and the other fields of the file
    return {
        "MTA": Cost(bank_bytes, merge_bytes + stack * number * run.stack.enabled, bank, merge + adapt),
        "merge alone": Cost(bank_bytes, merge_bytes, bank, merge + over),
        "OPPU": Cost(task_rank * number, rank * number, task, trained(OPPU_TRAINING.examples(shots), task_rank, rank)),
    }


def memory(shape: Shape, run: Run, data: DataSizes) -> Memory:
    """Return the memory of base, bank, a served row, and training; ``memory=`` bounds the parts of training."""
    ranks = run.bank.anchors * run.bank.lora.rank + _task_rank(run)
    row = SERVED * (shape.cached * data.context + ranks + run.stack.lora.rank * shape.width)
    task_lora = _task_rank(run) * shape.width
    footprint = replace(shape.footprint, checkpointed=run.gradient_checkpointing)
    trained = [
        ParameterCounts(rank * shape.width, task_lora=task_lora) for rank in (run.bank.lora.rank, run.stack.lora.rank)
    ]
    anchor, stack = (float(COPIES * STORED * numbers.trained + footprint.person(numbers)) for numbers in trained)
    token = footprint.token(TextLengths(round(data.tokens), round(data.shared)), footprint.ranks(trained[1]))
    weight = WEIGHT[shape.stored if run.quantize == "none" else run.quantize]
    base = SERVED * (shape.parameters - shape.linear) + weight * shape.linear
    bank = 2.0 * SERVED * ranks * shape.width
    return Memory(base, bank, float(row), anchor, stack, float(token), float(footprint.target))


def what_fits(machine: Hardware, memory: Memory) -> str:
    """Return in words what a GPU has room for beside base and bank; empty for hardware of unknown memory."""
    if not machine.memory:
        return ""
    free = USABLE * machine.memory - memory.base - memory.bank
    has = f"{USABLE:.0%} of {human_bytes(machine.memory)} on {machine.name}"
    if free <= 0:
        return f"Does not fit: base and bank need {human_bytes(memory.base + memory.bank)}, more than {has}"
    tokens, rows = free / 2 / (memory.token + memory.target), free / memory.row  # half is for adapters
    return (
        f"Fits {has}: base and bank leave {human_bytes(free)} for memory=, which trains about {tokens:,.0f} tokens "
        f"in a pass, or for {rows:,.0f} served rows"
    )


def _task_rank(run: Run) -> int:
    return run.task_lora.lora.rank if run.task_lora.enabled else 0


def _scored(shape: Shape, data: DataSizes, examples: float, ranks: float) -> float:
    """Return the forward operations: layers, adapters of total rank ``ranks``, and LM head at targets."""
    weights = shape.linear + shape.footprint.sums.experts
    per_token = 2 * (weights + ranks * shape.width + shape.head * data.targets / data.computed)
    return examples * data.computed * per_token


def _trained(shape: Shape, data: DataSizes, again: bool, examples: float, frozen: float, ranks: float) -> float:
    """Return the training operations: forward, perhaps ``again``, backward to all inputs, and to trained factors."""
    gradients = 2 * examples * data.computed * ranks * shape.width
    return (2 + again) * _scored(shape, data, examples, frozen + ranks) + gradients
