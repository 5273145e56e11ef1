"""Where a run's losses and rates can go beside its own ``metrics.jsonl``: TensorBoard, Weights & Biases, Trackio.

A backend is imported when it is asked for, and is given numbers alone: no settings, no command, nobody's id or text.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mta.errors import InputError

PROJECT = "mta"


class Sink(Protocol):
    """What takes numbers as they come."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Named values at a step; each name counts its own steps."""

    def close(self) -> None:
        """Nothing more will come."""


Track = Callable[[Path], Sink]
"""Opens a sink for a run's folder."""


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
    """A run of Weights & Biases, its files under ``<run>/wandb``; WANDB_MODE=offline needs no network and no account.

    What the package would collect by itself (command, machine, code, console) is switched off.
    """

    def __init__(self, run: Path) -> None:
        wandb = importlib.import_module("wandb")
        collects = {"disable_git": True, "save_code": False, "x_disable_meta": True, "x_disable_stats": True}
        quiet = {"console": "off", "silent": True, "x_disable_machine_info": True}
        try:
            self._run = wandb.init(project=PROJECT, dir=str(run), settings=wandb.Settings(**collects, **quiet))
        except wandb.Error as error:
            raise InputError(
                f"wandb did not begin a run: {str(error).splitlines()[0]}", hint="wandb login, or WANDB_MODE=offline"
            ) from None
        self._run.define_metric("*", step_metric="step")  # its own steps cannot go back to 1 for the next stage

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A local Trackio project under ``<run>/trackio`` (or TRACKIO_DIR)."""

    def __init__(self, run: Path) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(run / "trackio"))  # read when it is imported
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            self._trackio = importlib.import_module("trackio")
            self._trackio.init(project=PROJECT, auto_log_cpu=False, auto_log_gpu=False)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._trackio.finish()


SINKS: Mapping[str, Track] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def tracker(name: str) -> Track:
    """What opens the sink of that name. Raises InputError for an unknown one, or where its package is missing."""
    if name not in SINKS:
        raise InputError(f"nothing is called {name!r} that a run can be tracked with", hint=f"Give {_LISTED}.")
    if find_spec(name) is None:
        raise InputError(f"tracking needs {name}, which is not installed", hint=f"pip install {name}")
    return SINKS[name]


_LISTED = "--track tensorboard, wandb or trackio"
