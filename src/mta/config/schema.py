"""Settings of a run: pydantic models, filled from a YAML file and ``key=value`` words on the command line.

Defaults follow the paper's README where it gives them (50 anchors). The others are our choice, including K: the README
uses the 2 nearest anchors, our default policy weighs all anchors.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, field_validator, model_validator

from mta.config import plugins
from mta.config.loader import S, Settings, checked, merged_over, read_yaml
from mta.errors import ConfigError

POLICIES = "laplace", "none", "posterior", "similarity"
POLICY_GROUP = "mta.policies"  # of the entry points by which policies of other packages are found


def _known_policy(name: str) -> str:
    known = sorted({"auto", *POLICIES, *plugins.names(POLICY_GROUP)})
    if name not in known:
        raise ValueError(f"no such policy; expected one of {', '.join(known)}")
    return name


Policy = Annotated[str, AfterValidator(_known_policy)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Lora(Settings):
    """Shape of one LoRA. The update of a layer is ``alpha / rank * B @ A``."""

    rank: int = Field(default=8, ge=1, description="R of A (R, D) and B (O, R)")
    alpha: float = Field(default=16.0, gt=0, description="the update has the scale alpha / rank")

    @property
    def scale(self) -> float:
        """The factor ``s`` of B @ A."""
        return self.alpha / self.rank


class Training(Settings):
    """How one adapter is trained. If ``steps`` is set, ``epochs`` has no effect.

    If a file or the command line sets only ``epochs``, default ``steps`` have no effect.
    """

    lr: float = Field(default=2e-4, gt=0, description="learning rate of AdamW")
    steps: int | None = Field(default=None, ge=0, description="optimizer steps; null: use epochs")
    epochs: float = Field(default=1.0, gt=0, description="passes over the examples, if steps is not set")
    batch_size: int = Field(default=8, ge=1, description="examples of one person per step")
    schedule: Literal["constant", "linear", "cosine"] = Field(default="constant", description="learning rate schedule")
    warmup: float = Field(default=0.0, ge=0, le=1, description="share of steps with a rising learning rate")
    weight_decay: float = Field(default=0.0, ge=0, description="weight decay of AdamW")
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm of one person")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="beta1 of AdamW")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="beta2 of AdamW")
    eps: float = Field(default=1e-8, gt=0, description="epsilon of AdamW")
    lr_shrink_examples: float = Field(
        default=0.0, ge=0, description="n examples are trained at the rate lr * n / (n + lr_shrink_examples)"
    )

    def steps_for(self, items: int) -> int:
        """Return the number of optimizer steps on so many examples. The last batch is filled with the next pass's."""
        if not items:
            return 0
        if self.steps is not None:
            return self.steps
        return math.ceil(self.epochs * items / min(self.batch_size, items))

    def examples(self, items: int) -> int:
        """Return how many examples a training on so many items passes over."""
        return self.steps_for(items) * min(self.batch_size, items)


class TaskLoraSettings(Settings):
    """Stage 0. ``items`` limits the pooled examples, ``per_person`` the examples of one person.

    Candidates for anchors train the task LoRA, too. Candidates who do not become anchors keep their first ``unseen``
    items back, for the bank's calibration.
    """

    enabled: bool = Field(default=True, description="train the task LoRA on pooled items, before all later stages")
    lora: Lora = Lora()
    training: Training = Training(lr=5e-4, epochs=1, batch_size=32, schedule="cosine", warmup=0.05)
    items: int = Field(default=4000, ge=1, description="maximum number of pooled examples")
    per_person: int = Field(default=64, ge=1, description="maximum number of examples of one person")
    unseen: int | None = Field(
        default=16, ge=2, description="first items kept back by candidates; null: candidates do not train the task LoRA"
    )
    history: int = Field(
        default=0, ge=0, description="maximum number of the person's earlier items in every prompt, in training and use"
    )
    rounds: int = Field(default=4, ge=1, description="maximum number of rounds, while held-out people gain")

    @property
    def kept_back(self) -> int | None:
        """Number of first items that candidates keep back; None if they do not train the task LoRA."""
        return self.unseen if self.enabled else None


class BankSettings(Settings):
    """Stage 1. At most a quarter of the candidates become anchors."""

    anchors: int = Field(default=50, ge=1, description="number of anchors, at most a quarter of the candidates")
    min_items: int = Field(default=11, ge=2, description="minimum number of items of a candidate; paper: more than 10")
    max_items: int = Field(default=200, ge=2, description="maximum number of items of an anchor, the most recent")
    lora: Lora = Lora()
    training: Training = Training(lr=2e-4, epochs=2, batch_size=8)
    encode: Literal["input", "both", "history"] = Field(
        default="both", description="encoders read input, both (input and answer), or history (all items as one text)"
    )
    choose: Literal["groups", "active", "central", "random"] = Field(
        default="active", description="groups, or each cluster's most active (paper), central, or random person"
    )
    rounds: int = Field(
        default=1, ge=1, description="maximum number of rounds of grouping, while people outside the groups gain"
    )
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="numbers of groups to compare, on people outside the groups; empty: bank.anchors"
    )
    group_items: int = Field(default=800, ge=1, description="maximum number of items of a group")
    min_people: int = Field(default=4, ge=1, description="minimum number of people in a group")
    start: Literal["same", "own"] = Field(default="same", description="initial A: same for all anchors or own for each")

    @property
    def first_bank(self) -> int:
        """The number of single people that a bank starts from."""
        return self.anchors * (2 if self.choose == "groups" else 1)

    @property
    def first_training(self) -> Training:
        """The training of that bank: below groups of at most four steps, because it only ranks people."""
        few = min(self.training.steps or 4, 4)
        return self.training.model_copy(update={"steps": few}) if self.choose == "groups" else self.training


class CalibrationSettings(Settings):
    """How a bank is calibrated on candidates who are not anchors: earlier items are shots, later ones queries."""

    enabled: bool = Field(default=True, description="calibrate the bank when it is built")
    people: int = Field(default=48, ge=0, description="maximum number of people")
    shots: int = Field(default=8, ge=1, description="maximum number of shots of a person")
    queries: int = Field(default=4, ge=1, description="later items per person; more with few people")
    steps: int = Field(default=2, ge=1, description="Newton steps to the population's best merge")


class MergeSettings(Settings):
    """Stage 2: which anchors are merged, and how the shots determine their coefficients.

    ``auto`` is the laplace policy for calibrated banks, which merges all anchors, and posterior otherwise.
    ``k`` anchors are retrieved by cosine of the encodings (as in the paper); 0 = all.
    """

    policy: Policy = Field(default="auto", description="how the shots determine the coefficients")
    k: int = Field(default=0, ge=0, description="anchors retrieved, 0 = all; the paper takes 2")
    tau: float = Field(default=0.2, gt=0, description="temperature of the similarity policy")
    temperature: float = Field(default=4.0, gt=0, description="T of the posterior policy")
    null_prior: float = Field(default=0.5, gt=0, lt=1, description="prior probability of the posterior's null anchor")
    scale: float = Field(default=1.0, gt=0, description="factor of all coefficients")
    options: dict[str, Any] = Field(default={}, description="settings of a policy from another package")

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if self.options:
            known = self.policy in plugins.names(POLICY_GROUP)
            if (kind := plugins.load(POLICY_GROUP, self.policy).options if known else None) is None:
                raise ValueError(f"policy {self.policy!r} has no options")
            checked(kind, self.options, "options")
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # ``options`` has no hash


class StackSettings(Settings):
    """Stage 3: the stack, a rank-1 LoRA on top of the frozen merge.

    ``training`` given in a file or as a word replaces what the bank's calibration found.
    """

    enabled: bool = Field(default=True, description="train a stack")
    calibrated: bool = Field(
        default=True, description="use the training of the bank's calibration, if any; false if stack.training is given"
    )
    lora: Lora = Lora(rank=1, alpha=16.0)
    training: Training = Training(lr=2e-4, steps=8, batch_size=64)

    @model_validator(mode="before")
    @classmethod
    def _given_training_counts(cls, values: Any) -> Any:
        given = isinstance(values, dict) and "training" in values and "calibrated" not in values
        return values | {"calibrated": False} if given else values


class Run(Settings):
    """All settings that determine a result. The same settings give the same tensors (on GPUs, up to rounding)."""

    base: str = Field(default="smollm2-135m-instruct", description="asset name, folder, GGUF file, or hub id")
    task: str = Field(default="text", description="built-in task, or a YAML file")
    encoder: str = Field(default="all-minilm-l6-v2", description="asset name, folder, hub id, or base (hidden states)")
    seed: Seed = Field(default=0, description="seed of all random draws")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        default="auto", description="adapters are float32; the base has this dtype"
    )
    quantize: Literal["none", "nf4", "int8"] = Field(
        default="none", description="store the base's linear layers in 4 or 8 bits, with bitsandbytes"
    )
    device: str = Field(default="auto", description="cpu, cuda, or auto (the GPU if there is one)")
    memory: str = Field(default="4GiB", description="limit for one cohort's adapters, optimizer, and activations")
    gradient_checkpointing: bool = Field(default=False, description="less memory, but up to half more time")
    max_tokens: int = Field(default=1024, ge=16, description="longest example; prompts are cut if the task allows it")
    task_lora: TaskLoraSettings = TaskLoraSettings()
    bank: BankSettings = BankSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    merge: MergeSettings = MergeSettings()
    stack: StackSettings = StackSettings()

    @field_validator("memory", mode="before")
    @classmethod
    def _memory_is_a_size(cls, memory: object) -> str:
        parse_size(size := str(memory))  # a number is a number of bytes
        return size


OPPU_TRAINING = Training(lr=2e-4, steps=8, batch_size=64)  # where no calibration says how to train it


class CompareSettings(Settings):
    """What is compared: methods learn from a person's first ``shots`` items, and predict the next ``queries`` items."""

    shots: int = Field(default=8, ge=1, description="first items of a person, to learn from")
    queries: int = Field(default=12, ge=1, description="next items of a person, to predict")
    seeds: tuple[Seed, ...] = Field(default=(), description="random seeds; empty: the run's seed")
    policies: tuple[Policy, ...] = Field(
        default=("similarity", "posterior", "laplace"), description="policies of the merge-only methods"
    )
    brief: bool = Field(default=False, description="compare only constants, the task LoRA, rivals, the merge, and MTA")
    controls: bool = Field(
        default=False, description="also compare one merge for everybody, and MTA from another person's shots"
    )


_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as '4GiB', '500 MB' or '1024'. Raises ConfigError."""
    digits = text.strip().rstrip("BKMGTibkmgt ")
    unit = text.strip()[len(digits) :].strip().upper() or "B"
    try:
        size = int(float(digits) * _UNITS[unit])
        if size <= 0:
            raise ValueError
        return size
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(
            f"not a size: {text!r}; expected a number with B, KiB, MiB, GiB, KB, MB or GB",
            hint="Write a size such as  4GiB",
        ) from None


def override(settings: S, words: Iterable[str], path: str | Path | None = None, *, beside: Container[str] = ()) -> S:
    """Return the settings, overridden by a YAML file and then by ``a.b=value`` words.

    Keys of the file that are in ``beside`` belong to other settings and are skipped. Raises ConfigError that names key
    and value, and whether the file or a word is wrong.
    """
    kind, values = type(settings), merged_over(settings.model_dump(mode="json"), read_yaml(path, beside))
    if path:
        checked(kind, values, str(path))
    return checked(kind, _with_words(kind, values, words), "the command line")


_EXAMPLES = {"shots": "shots=8", "bank": "memory=8GiB", "run": "run.memory=8GiB"}  # words, by a setting beside them


def _with_words(kind: type[Settings], values: dict[str, Any], words: Iterable[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            example = next((word for name, word in _EXAMPLES.items() if name in kind.model_fields), "key=value")
            raise ConfigError(f"not a setting: {word!r}; expected key=value", hint=f"For example:  {example}")
        *parents, last = key.split(".")
        inner, beside = given, values
        for depth, parent in enumerate(parents, 1):
            inner, beside = inner.setdefault(parent, {}), beside.get(parent, {})
            if not isinstance(inner, dict) or not isinstance(beside, dict):
                raise ConfigError(
                    f"{word!r}: {parent!r} is a single value, not a group of settings",
                    hint=f"Set it directly:  {'.'.join(parents[:depth])}=…",
                )
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date such as 2020-99-99
            raise ConfigError(
                f"{word!r}: the value is not readable YAML", hint=f"If it is text, quote it:  '{key}=\"…\"'"
            ) from None
        both = isinstance(value, dict) and isinstance(inner.get(last), dict)
        inner[last] = merged_over(inner[last], value) if both else value
    return merged_over(values, given)
