"""The key of a bank: a hash of all inputs of its tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from mta.bank.format import UNKNOWN_TO_0_1_0, file_hashes, names_as_in_0_1_0
from mta.config import Run, TaskLoraSettings
from mta.config.constants import COMPUTED_WITH
from mta.data.history import Person
from mta.data.tasks.task import Task
from mta.lora.peft import CONFIG, WEIGHTS
from mta.model.base import BaseModel
from mta.model.encoders import Encoder
from mta.system.atomic import json_sha256

# Settings that the work key leaves out: they do not affect a bank, or the key holds a fingerprint instead.
NOT_IN_KEY = {"merge", "stack", "base", "encoder", "task", *COMPUTED_WITH}


@dataclass(frozen=True, slots=True)
class BuildKeys:
    """The keys of one build. ``histories`` are the ids and item digests of each group of people."""

    histories: list[list[list[str]]]
    whole: str  # of the bank with its calibration
    training: str  # of stages 0 and 1
    older: tuple[str, ...]  # as earlier versions gave

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
        both = run, uncalibrated(run)
        whole, training = (build_key(*inputs, settings, task_lora) for settings in both)
        with_memory = (
            build_key(*inputs, settings, task_lora, NOT_IN_KEY - {"memory"})
            for settings in (*both, with_old_defaults(run))
        )
        return cls(histories, whole, training, tuple(with_memory))

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
    unused: Set[str] = NOT_IN_KEY,
) -> str:
    """Return a hash of all inputs that affect the tensors of a bank by more than rounding."""
    left_out = set(unused) if run.calibration.enabled else {*unused, "calibration"}
    settings = run.model_dump(mode="json", exclude=left_out)
    if run.calibration.enabled:  # it measures stacks too
        settings["stack"] = run.stack.model_dump(mode="json", include={"enabled", "lora"})
    for name in names_as_in_0_1_0(run.task_lora):  # as version 0.1.0 wrote it
        del settings["task_lora"][name]
    work = json_sha256([base.fingerprint, encoder.fingerprint, task.identity, settings, histories])
    if task_lora is None:
        return work
    return json_sha256([work, file_hashes(task_lora, [CONFIG, WEIGHTS])])


def uncalibrated(run: Run) -> Run:
    """Return the run without a calibration."""
    return run.model_copy(update={"calibration": run.calibration.model_copy(update={"enabled": False})})


def with_old_defaults(run: Run) -> Run:
    """Return the run with today's defaults replaced by what 0.1.0 did."""
    defaults, before = TaskLoraSettings(), UNKNOWN_TO_0_1_0 | {"per_person": 32}
    found = {name: old for name, old in before.items() if getattr(run.task_lora, name) == getattr(defaults, name)}
    return uncalibrated(run.model_copy(update={"task_lora": run.task_lora.model_copy(update=found)}))
