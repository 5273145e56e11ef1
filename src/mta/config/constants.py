"""Values that several packages share, and that are no settings."""

from enum import Enum

SHOTS = (1, 4, 8, 16)  # numbers of shots that calibrations and evaluations compare
ROUNDING_ONLY = frozenset({"device", "memory", "gradient_checkpointing"})  # settings that change rounding at most
NOTICEABLE = 0.02  # nats: smaller differences of an NLL do not count


class SharedModel(Enum):
    """Models without a person: the pooled model (base and task LoRA), or the base."""

    TASK = "task"
    BASE = "base"
