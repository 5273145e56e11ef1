"""Trackers for losses and rates, besides ``metrics.jsonl``: TensorBoard and Weights & Biases.

A backend is imported only when requested. It receives only numbers: no settings, no command, no ids or texts of people.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mta.errors import InputError
from mta.system.extras import require

PROJECT = "mta"


class Sink(Protocol):
    """Receiver of metrics."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log named values at a step; each name counts its own steps."""

    def close(self) -> None:
        """Finish; no more values follow."""


Track = Callable[[Path], Sink]
"""Function that opens a sink for a run's folder."""


class TensorBoard:
    """Event files under ``<run>/tensorboard``."""

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A Weights & Biases run under ``<run>/wandb``. WANDB_MODE=offline needs no network and no account.

    The package's own collection of command, machine, code and console is switched off.
    """

    def __init__(self, run: Path) -> None:
        wandb = importlib.import_module("wandb")
        collects = {"disable_git": True, "save_code": False, "x_disable_meta": True, "x_disable_stats": True}
        quiet = {"console": "off", "silent": True, "x_disable_machine_info": True}
        try:
            self._run = wandb.init(project=PROJECT, dir=str(run), settings=wandb.Settings(**collects, **quiet))
        except wandb.Error as error:
            raise InputError(
                f"wandb could not start a run: {str(error).splitlines()[0]}",
                hint="wandb login   (or set WANDB_MODE=offline)",
            ) from None
        self._run.define_metric("*", step_metric="step")  # wandb's own step cannot restart at 1 for the next stage

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


SINKS: Mapping[str, Track] = {"tensorboard": TensorBoard, "wandb": Wandb}


def tracker(name: str) -> Track:
    """Return the function that opens a sink. Raises InputError for an unknown name, MissingExtra."""
    if name not in SINKS:
        raise InputError(
            f"unknown tracker {name!r}; expected one of {', '.join(SINKS)}",
            hint="Give --track tensorboard or wandb.",
        )
    require(name)
    return SINKS[name]
