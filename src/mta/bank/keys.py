"""The key of a bank: a hash of all inputs of its tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mta.bank.format import file_hashes
from mta.config import Run
from mta.config.constants import ROUNDING_ONLY
from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.lora.peft import CONFIG, WEIGHTS
from mta.model.base import BaseModel
from mta.model.encoders import Encoder
from mta.system.atomic import json_sha256

# Settings that the work key leaves out: they do not affect a bank, or the key holds a fingerprint instead.
NOT_IN_KEY = {"merge", "stack", "base", "encoder", "task", *ROUNDING_ONLY}


@dataclass(frozen=True, slots=True)
class BuildKeys:
    """The keys of one build. ``histories`` are the ids and item digests of each group of people."""

    histories: list[list[list[str]]]
    whole: str  # of the bank with its calibration
    training: str  # of stages 0 and 1

    @classmethod
    def of(
        cls,
        base: BaseModel,
        task: Task,
        encoder: Encoder,
        groups: Sequence[Sequence[Person]],
        run: Run,
        task_lora: Path | None,
    ) -> BuildKeys:
        """Return the keys for groups of people, each in the order of ids, and settings."""
        histories = [[[person.id, person.digest()] for person in group] for group in groups]
        inputs = base, task, encoder, histories
        whole, training = (build_key(*inputs, settings, task_lora) for settings in (run, uncalibrated(run)))
        return cls(histories, whole, training)

    @property
    def secret(self) -> str:
        """What only the people's histories give: the key of the whole bank is in ``bank.json``."""
        return json.dumps([self.whole, self.histories])


def build_key(
    base: BaseModel,
    task: Task,
    encoder: Encoder,
    histories: object,
    run: Run,
    task_lora: Path | None = None,
) -> str:
    """Return a hash of all inputs that affect the tensors of a bank by more than rounding."""
    left_out = NOT_IN_KEY if run.calibration.enabled else {*NOT_IN_KEY, "calibration"}
    settings = run.model_dump(mode="json", exclude=left_out)
    if run.calibration.enabled:  # it measures stacks too
        settings["stack"] = run.stack.model_dump(mode="json", include={"enabled", "lora"})
    work = json_sha256([base.fingerprint, encoder.fingerprint, task.identity, settings, histories])
    if task_lora is None:
        return work
    return json_sha256([work, file_hashes(task_lora, [CONFIG, WEIGHTS])])


def uncalibrated(run: Run) -> Run:
    """Return the run without a calibration."""
    return run.model_copy(update={"calibration": run.calibration.model_copy(update={"enabled": False})})
