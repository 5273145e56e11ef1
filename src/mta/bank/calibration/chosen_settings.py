"""Which policy and which stack a bank's calibration chose: what the settings leave to the bank."""

from __future__ import annotations

from mta.bank.calibration.info import CalibrationInfo
from mta.config import Lora, MergeSettings, Run, StackSettings, Training


def with_calibrated_settings(run: Run, found: CalibrationInfo | None, shape: Lora) -> Run:
    """Return the run with ``auto`` settings replaced by what the bank's calibration found: policy, stack's training.

    ``shape`` is that of the stacks in the calibration.
    """
    merge = calibrated_merge(run.merge, found)
    return run.model_copy(update={"merge": merge, "stack": calibrated_stack(run.stack, merge, found, shape)})


def calibrated_merge(merge: MergeSettings, found: CalibrationInfo | None) -> MergeSettings:
    """Return the settings of a merge with a policy other than ``auto``.

    ``auto`` is laplace where the calibration could measure something, for merges of all anchors.
    """
    policy = "laplace" if found and found.gains and merge.k == 0 else "posterior"
    return merge.model_copy(update={"policy": policy}) if merge.policy == "auto" else merge


def calibrated_stack(
    stack: StackSettings, merge: MergeSettings, found: CalibrationInfo | None, shape: Lora
) -> StackSettings:
    """Return the settings of a stack with the calibrated training, or without a stack where it does not help.

    The calibration is about stacks of one ``shape`` over merges by the laplace policy, as they are; for others,
    the stack's own training counts.
    """
    as_measured = merge.policy == "laplace" and merge.scale == 1
    alike = as_measured and stack.lora == shape
    if not stack.calibrated or not alike or found is None or found.rate is None:
        return stack.model_copy(update={"calibrated": False})
    if not found.rate:
        return stack.model_copy(update={"calibrated": False, "enabled": False})
    return stack.model_copy(update={"calibrated": False, "training": one_step(found.rate)})


def one_step(rate: float) -> Training:
    """Return the training of a stack by one step over all shots; few shots get a lower rate."""
    return Training(lr=rate, steps=1, batch_size=1_000_000, lr_shrink_examples=8)
