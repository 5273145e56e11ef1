"""What a bank has to beat: personal models without one. Source: our choice; each has its own calibrated setting."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from mta.bank.calibration.calibrate import rivals_of
from mta.bank.calibration.info import ALONE, LABEL_BIAS, OPPU, one_step
from mta.bank.calibration.label_bias import features_of, label_biases
from mta.config import Training, parse_size
from mta.data.tasks.task import Task
from mta.evaluation.methods.merged import adapted
from mta.evaluation.methods.method import Method, answer
from mta.evaluation.methods.plain import TaskLora
from mta.evaluation.metrics import from_scores
from mta.evaluation.protocol import Outcome, TestBatch
from mta.system.device import clock
from mta.training.scoring import label_scores


class LabelBias(Method):
    """A bias on the pooled model's labels, fitted to the shots: a few numbers per person, no LoRA, no gradient.

    ``std`` is that of the prior; None: as the bank's calibration chose it, or 0.5 without one.
    """

    method: Literal["label-bias"] = "label-bias"
    name: str = LABEL_BIAS
    std: float | None = None

    def fits(self, task: Task, anchors: int, calibrated: bool) -> bool:
        return task.labelled

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        calibration, std, over = batch.bank.info.calibration, self.std, batch.bank.task_adapters
        if std is None and calibration:
            std = calibration.setting_of(LABEL_BIAS)
        items, start = [person.items for person in batch.people], clock(batch.base.device)
        shots = label_scores(batch.base, batch.task, items, over, memory=parse_size(batch.run.memory))
        biases = label_biases(batch.task, items, shots, std)
        seconds = clock(batch.base.device) - start
        answers = []
        for asked, bias, scores in zip(answer(batch, range(len(items)), over), biases, shots):
            assert asked.scores is not None  # the task has labels
            biased = from_scores(batch.task, asked.scores.double() + bias)
            answers.append(replace(biased, shots=scores, prompt_tokens=asked.prompt_tokens))
        return Outcome(answers, seconds, 4.0 * features_of(batch.task.labels or ()).shape[1])


class CalibratedLora(Method):
    """One LoRA per person over the task LoRA, without a bank, trained as the bank's calibration chose for its shape.

    OPPU has the shape of an anchor, "rank 1 alone" that of a stack. ``training`` counts where nothing was calibrated.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2402.04401"
    seeded: ClassVar[bool] = True
    method: Literal["calibrated-lora"] = "calibrated-lora"
    name: str = OPPU
    shape: Literal["anchor", "stack"] = "anchor"
    training: Training | None = None

    def run(self, batch: TestBatch, seed: int) -> Outcome:
        info, rival = batch.bank.info, ALONE if self.shape == "stack" else OPPU
        lora = rivals_of(info.run)[rival]
        rate = info.calibration.setting_of(rival) if info.calibration else None
        if rate == 0:
            return TaskLora().run(batch, seed)
        training = one_step(rate) if rate else self.training or batch.context.run.stack.training
        return adapted(batch, self.name, lora, training, seed)
