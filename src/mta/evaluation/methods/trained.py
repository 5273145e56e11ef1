"""Methods that train one LoRA per person."""

from __future__ import annotations

import time
from functools import partial
from typing import ClassVar, Literal

from mta.config import Lora, MergeSettings, Training
from mta.evaluation.methods.answer import answer
from mta.evaluation.methods.method import Method, Outcome, register
from mta.evaluation.metrics import Answers
from mta.evaluation.protocol import Panel
from mta.lora.layers import Adapters, PerPerson
from mta.personalize.merge import Merge, merged
from mta.personalize.stages import adapt
from mta.training.plan import numbers_of


@register
class OneLora(Method):
    """One LoRA per person, trained on the shots over the task LoRA: OPPU at rank 8, "adapt only" at the stack's rank.

    Without ``training``, the training settings of the run's stack are used.
    OPPU's published code trains person i on people 0 to i; here each person is trained on their own shots only.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2402.04401"
    method: Literal["one-lora"] = "one-lora"
    name: str = "OPPU"
    lora: Lora = Lora()
    training: Training | None = None

    @property
    def seeded(self) -> bool:
        return True

    def run(self, panel: Panel, seed: int) -> Outcome:
        training = self.training or panel.run.stack.training
        return adapted(panel, None, None, self.lora, training, seed, self.name)


def adapted(
    panel: Panel,
    merge: Merge | None,
    settings: MergeSettings | None,
    lora: Lora,
    training: Training,
    seed: int,
    stage: str,
) -> Outcome:
    """Train one LoRA per person over the task LoRA and, if given, their merge, and answer the queries.

    Cohorts that fit the memory are trained and asked one after another.
    """
    base, jobs, on_step = panel.base, panel.jobs, panel.shots.context.on_step
    numbers = numbers_of(base, lora)
    plan = panel.plan(numbers, settings)
    answers: list[Answers] = []
    seconds = 0.0
    for cohort in plan.cohorts:
        frozen: list[Adapters] = list(panel.bank.pooled)
        if merge and settings:
            frozen.append(merged(panel.bank, merge.select(cohort), settings))
        start = time.monotonic()
        found = adapt(
            base,
            [jobs[i] for i in cohort],
            frozen,
            lora,
            training,
            seed=seed,
            tokens_per_batch=plan.tokens_per_batch,
            on_step=partial(on_step, stage) if on_step else None,
        )
        seconds += time.monotonic() - start
        answers += answer(panel, cohort, [*frozen, PerPerson(found)])
    return Outcome(answers, seconds, 4.0 * numbers, merge)
