"""The readable part of a calibration, as it is in ``bank.json``, and the policy and stack that settings leave to it."""

from __future__ import annotations

from pydantic import BaseModel

from mta.config import Lora, MergeSettings, Run, StackSettings, Training


class Gain(BaseModel, frozen=True, extra="forbid"):
    """What a person is expected to gain on later items from ``shots`` items, measured on ``people`` people.

    ``mean`` with its 95% interval (``low``, ``high``): decrease of the mean NLL per target token against the pooled
    model, in nats. ``worse``: share of people whose NLL rose by more than 0.02.
    """

    shots: int
    people: int
    mean: float
    low: float
    high: float
    worse: float


LABEL_BIAS, ALONE, OPPU = "label bias", "rank 1 alone", "OPPU"  # what a bank has to beat
NO_HISTORY = "task LoRA, no history"  # where the bank's prompts show one


class Rival(BaseModel, frozen=True, extra="forbid"):
    """What a person gains without the bank, by the same rules: ``gain``; and ``ahead``, the bank's gain minus that.

    ``setting`` is the standard deviation of a label bias's prior, or the rate of a LoRA's single step over the pooled
    model; 0: no step helps, so that the LoRA is the pooled model itself.
    """

    name: str
    setting: float
    gain: Gain
    ahead: Gain


class CalibrationInfo(BaseModel, frozen=True, extra="forbid"):
    """The readable part of a calibration: how far gradients are trusted, and what to expect from it.

    ``prior`` is the strength of the prior in shots, and ``ridge`` the part of the mean curvature that is added to all
    directions. ``rate`` is the learning rate of a stack's single step (0: a stack does not help; None: not measured).
    ``gains`` are the expected gains of a merge for several numbers of shots, ``stacked`` those of merge and stack,
    ``rivals`` are what people gain without the bank. ``people`` is the number of people behind all of these, and
    ``notes`` say what could not be measured.
    """

    ridge: float
    prior: float
    rate: float | None = None
    people: int = 0
    gains: tuple[Gain, ...] = ()
    stacked: tuple[Gain, ...] = ()
    rivals: tuple[Rival, ...] = ()
    notes: tuple[str, ...] = ()

    def setting_of(self, rival: str) -> float | None:
        """Return the setting of a rival; None if it was not measured."""
        return next((one.setting for one in self.rivals if one.name == rival), None)


DEFAULTS = CalibrationInfo(ridge=1.0, prior=16.0)  # where there are too few people to choose


def with_calibrated_settings(run: Run, info: CalibrationInfo | None, shape: Lora) -> Run:
    """Return the run with ``auto`` settings replaced by what the bank's calibration found: policy, stack's training.

    ``shape`` is that of the stacks in the calibration.
    """
    merge = calibrated_merge(run.merge, info)
    return run.model_copy(update={"merge": merge, "stack": calibrated_stack(run.stack, merge, info, shape)})


def calibrated_merge(merge: MergeSettings, info: CalibrationInfo | None) -> MergeSettings:
    """Return the settings of a merge with a policy other than ``auto``.

    ``auto`` is laplace where the calibration could measure something, for merges of all anchors.
    """
    policy = "laplace" if info and info.gains and merge.k == 0 else "posterior"
    return merge.model_copy(update={"policy": policy}) if merge.policy == "auto" else merge


def calibrated_stack(
    stack: StackSettings, merge: MergeSettings, info: CalibrationInfo | None, shape: Lora
) -> StackSettings:
    """Return the settings of a stack with the calibrated training, or without a stack where it does not help.

    The calibration is about stacks of one ``shape`` over merges by the laplace policy, as they are, and over no merge
    (rank 1 alone); for others, the stack's own training counts.
    """
    found, rate = dict[str, object](), None
    if stack.calibrated and info and merge.scale == 1 and stack.lora == shape:
        rate = {"laplace": info.rate, "none": info.setting_of(ALONE)}.get(merge.policy)
    if rate is not None:
        found = {"training": one_step(rate)} if rate else {"enabled": False}
    return stack.model_copy(update={"calibrated": False} | found)


def one_step(rate: float) -> Training:
    """Return the training of a stack by one step over all shots; few shots get a lower rate."""
    return Training(lr=rate, steps=1, batch_size=1_000_000, lr_shrink_examples=8)
