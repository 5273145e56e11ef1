"""The settings of a run: pydantic models that a YAML file and ``key=value`` words on the command line fill.

Defaults follow the paper's README where it names them (50 anchors); the rest is our choice, K among it: that README
takes the 2 nearest anchors, our default policy weighs all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mta.errors import ConfigError

Policy = Literal["uniform", "top1", "similarity", "loss", "posterior", "ridge", "learned", "fixed"]
MergeMode = Literal["exact", "svd", "factor"]


class Settings(BaseModel):
    """Common behaviour: frozen, an unknown key is an error, and a group given in part keeps its other defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # Only where the field is of the default's own class: of several classes, one's defaults are not another's.
        fields = {name: field for name, field in cls.model_fields.items() if isinstance(field.default, Settings)}
        groups = {name: field.default for name, field in fields.items() if field.annotation is type(field.default)}
        return {
            name: merged_over(groups[name].model_dump(), value) if isinstance(value, dict) and name in groups else value
            for name, value in values.items()
        }


class Lora(Settings):
    """Shape of one LoRA; its update of a layer is ``alpha / rank * B @ A``."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)

    @property
    def scale(self) -> float:
        """The factor ``s`` in front of B @ A."""
        return self.alpha / self.rank


class Training(Settings):
    """How the factors of one adapter are trained. Where ``steps`` is set, ``epochs`` does not count.

    Giving ``epochs`` alone, in a file or as a word, takes the place of default ``steps``.
    """

    lr: float = Field(default=2e-4, gt=0)
    steps: int | None = Field(default=None, ge=0)
    epochs: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=8, ge=1)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = Field(default=0.0, ge=0, le=1, description="share of the steps")
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm of one person")
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


class TaskLoraSettings(Settings):
    """Stage 0. ``items`` bounds the pooled examples; ``per_person`` the share of one person."""

    enabled: bool = True
    lora: Lora = Lora()
    training: Training = Training(lr=5e-4, epochs=1, batch_size=32, schedule="cosine", warmup=0.05)
    items: int = Field(default=4000, ge=1)
    per_person: int = Field(default=32, ge=1)


class BankSettings(Settings):
    """Stage 1. Anchors are never more than a quarter of the candidates."""

    anchors: int = Field(default=50, ge=1)
    min_items: int = Field(
        default=11, ge=1, description="candidates have at least this many items (paper: more than 10)"
    )
    max_items: int = Field(default=200, ge=1, description="most recent items an anchor is trained on")
    lora: Lora = Lora()
    training: Training = Training(lr=2e-4, epochs=2, batch_size=8)
    encode: Literal["input", "both"] = "both"
    choose: Literal["active", "central", "random"] = Field(
        default="active", description="of a cluster; paper: the most active"
    )
    start: Literal["same", "own"] = Field(
        default="same", description="whether anchors begin from one A, or each from its own"
    )


class MergeSettings(Settings):
    """Stage 2: which anchors, and how their coefficients come from the shots.

    ``k`` anchors are retrieved, by cosine of the encodings (the paper's way) or by their loss on the shots; 0 takes
    all. ``learned`` follows the gradient of K numbers from the posterior's coefficients on, or from zero (the pooled
    model), which needs no pass per anchor. Its large eps makes AdamW a plain descent, so that a coefficient the shots
    say little about moves little; weight_decay pulls back to the start.
    """

    policy: Policy = "posterior"
    retrieve: Literal["cosine", "loss"] = "cosine"
    k: int = Field(default=0, ge=0, description="anchors retrieved, 0 = all; the paper takes 2")
    tau: float = Field(default=0.2, gt=0)
    temperature: float = Field(default=4.0, gt=0, description="T of the posterior policy")
    null_prior: float = Field(
        default=0.5, gt=0, lt=1, description="prior of the task LoRA alone in the posterior policy"
    )
    ridge: float = Field(default=300.0, gt=0, description="strength of the pull to zero in the ridge policy")
    fixed: float = Field(default=0.5, ge=0, le=1, description="share of the nearest anchor in the fixed policy")
    start: Literal["posterior", "zero"] = Field(default="posterior", description="where the learned policy begins")
    learned: Training = Training(lr=0.05, steps=1, batch_size=64, eps=1.0, clip=1e9)
    scale: float = Field(default=1.0, gt=0, description="multiplies all coefficients")
    mode: MergeMode = "exact"
    rank: int | None = Field(default=None, ge=1, description="rank of the svd mode; None keeps the bank's")


class StackSettings(Settings):
    """Stage 3: the rank-1 LoRA on top of the frozen merge."""

    enabled: bool = True
    lora: Lora = Lora(rank=1, alpha=16.0)
    training: Training = Training(lr=2e-4, steps=8, batch_size=64)


class Run(Settings):
    """Everything that decides a result. The same run with the same seed gives the same tensors."""

    base: str = "smollm2-135m-instruct"
    task: str = "text"
    encoder: str = "all-minilm-l6-v2"
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    device: str = "auto"
    memory: str = Field(default="4GiB", description="bound on one cohort: adapters, optimizer, activations")
    gradient_checkpointing: bool = Field(default=False, description="less memory, a third more time: for big bases")
    max_tokens: int = Field(default=1024, ge=16)
    task_lora: TaskLoraSettings = TaskLoraSettings()
    bank: BankSettings = BankSettings()
    merge: MergeSettings = MergeSettings()
    stack: StackSettings = StackSettings()

    @field_validator("memory")
    @classmethod
    def _memory_is_a_size(cls, memory: str) -> str:
        parse_size(memory)
        return memory


class OneLoraSettings(Settings):
    """A LoRA of a person's own over the task LoRA: OPPU, or the stack without a merge below it."""

    lora: Lora
    training: Training


class Evaluation(Settings):
    """What is compared, and on how much: the first ``shots`` items of a person, then the next ``queries``."""

    shots: int = Field(default=8, ge=1)
    queries: int = Field(default=12, ge=1)
    seeds: tuple[int, ...] = Field(default=(), description="none given: the run's own")
    oppu: OneLoraSettings = OneLoraSettings(lora=Lora(), training=Training(lr=2e-4, steps=8, batch_size=64))
    adapt: OneLoraSettings | None = Field(default=None, description="none given: as the run's stack")
    policies: tuple[Policy, ...] = ("uniform", "top1", "similarity", "loss", "posterior", "ridge", "learned")


class Privacy(Settings):
    """How a bank is attacked: whose models, made of how many shots, and how many items of each anchor they are asked.

    ``targets`` people who are in nothing of the bank are personalized from their first ``shots`` items; every model is
    asked about at most ``items`` items that anchors were trained on.
    """

    shots: int = Field(default=8, ge=1)
    targets: int = Field(default=16, ge=1)
    items: int = Field(default=16, ge=1)


_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes of '4GiB', '500 MB' or '1024'. Raises ConfigError."""
    digits = text.strip().rstrip("BKMGTibkmgt ")
    unit = text.strip()[len(digits) :].strip().upper() or "B"
    try:
        size = int(float(digits) * _UNITS[unit])
        if size <= 0:
            raise ValueError
        return size
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"not a size: {text!r}; expected a number with B, KiB, MiB, GiB, KB, MB or GB") from None


S = TypeVar("S", bound=Settings)


def load_settings(kind: type[S], path: str | Path | None = None, words: Iterable[str] = ()) -> S:
    """Settings from a YAML file, then ``a.b=value`` words over it. Raises ConfigError naming key and value."""
    values = read_yaml(Path(path)) if path else {}
    return checked(kind, _with_words(values, words), str(path or "the command line"))


def override(settings: S, words: Iterable[str], path: str | Path | None = None) -> S:
    """The same settings with those of a YAML file and ``a.b=value`` words over them.

    Raises ConfigError naming key and value.
    """
    values = merged_over(settings.model_dump(mode="json"), read_yaml(Path(path)) if path else {})
    return checked(type(settings), _with_words(values, words), str(path or "the command line"))


def merged_over(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """``values`` with ``more`` over them, group by group; epochs given alone replace steps."""
    if "epochs" in more and "steps" not in more and "steps" in values:
        values = values | {"steps": None}
    groups = [key for key, new in more.items() if isinstance(new, dict) and isinstance(values.get(key), dict)]
    return values | more | {key: merged_over(values[key], more[key]) for key in groups}


def _with_words(values: dict[str, Any], words: Iterable[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"not a setting: {word!r}; expected key=value, for example bank.anchors=20")
        *parents, last = key.split(".")
        inner, beside = given, values
        for parent in parents:
            inner, beside = inner.setdefault(parent, {}), beside.get(parent, {})
            if not isinstance(inner, dict) or not isinstance(beside, dict):
                raise ConfigError(f"{word!r}: {parent!r} is a single value, not a group of settings")
        try:
            inner[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{word!r}: the value is not readable YAML; quote it if it is text") from None
    return merged_over(values, given)


def checked(kind: type[S], values: dict[str, Any], source: str) -> S:
    """Settings from plain values; a pydantic error becomes a ConfigError that names key, value and source."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        got = repr(first["input"])
        raise ConfigError(f"{source}: {key}: {reason} (got {got[:100]}{'…' * (len(got) > 100)})") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping of settings from a YAML file; an empty file has none. Raises ConfigError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no such configuration file: {path}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    return values


def dump_yaml(settings: Settings) -> str:
    """The resolved settings as YAML, ready to be given back with --config."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
