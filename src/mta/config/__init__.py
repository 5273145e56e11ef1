"""Settings: schema, validation, and reading from YAML files and the command line."""

from mta.config.loader import Settings
from mta.config.schema import (
    BankSettings,
    CalibrationSettings,
    Evaluation,
    Lora,
    MergeMode,
    MergeSettings,
    OneLoraSettings,
    Policy,
    Privacy,
    Run,
    StackSettings,
    TaskLoraSettings,
    Training,
    load_settings,
    override,
    parse_size,
)

__all__ = [
    "BankSettings",
    "CalibrationSettings",
    "Evaluation",
    "Lora",
    "MergeMode",
    "MergeSettings",
    "OneLoraSettings",
    "Policy",
    "Privacy",
    "Run",
    "Settings",
    "StackSettings",
    "TaskLoraSettings",
    "Training",
    "load_settings",
    "override",
    "parse_size",
]
