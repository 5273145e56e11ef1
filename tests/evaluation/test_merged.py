"""MTA and its parts: cohort by cohort, and with the stack of the bank's calibration."""

from dataclasses import replace

import pytest
import torch
from batches import POSTERIOR, QUERIES, SHOTS, batch_of, same
from batches import batch as batch  # the fixture
from conftest import HashEncoder, memory_for, people_of

from mta.bank.calibration.info import CalibrationInfo, Gain, one_step
from mta.config import Lora, MergeSettings, Run, StackSettings, Training
from mta.evaluation.context import Context
from mta.evaluation.methods import MergeThenAdapt, OneLora
from mta.evaluation.protocol import TestBatch
from mta.personalize.merge import frozen_numbers
from mta.training.plan import parameters_of
from mta_lab.methods.published import Prime

SHAPE = Lora(rank=1, alpha=4.0)
STACK = StackSettings(lora=SHAPE, training=Training(lr=1e-2, steps=2, batch_size=8))


@pytest.mark.parametrize(
    "method",
    [MergeThenAdapt(merge=POSTERIOR, stack=STACK), OneLora(lora=SHAPE, training=STACK.training)],
    ids=lambda method: method.method,
)
def test_cohorts_one_after_another_give_the_answers_of_all_people_together(batch, method):
    base, bank = batch.base, batch.bank
    below = frozen_numbers(bank, None if isinstance(method, OneLora) else POSTERIOR)
    memory = memory_for(base, batch.jobs, parameters_of(base, SHAPE), 1, below=below)
    run = batch.context.run.model_copy(update={"memory": memory})
    narrow = replace(batch, context=replace(batch.context, run=run))
    assert len(narrow.plan(parameters_of(base, SHAPE), None if isinstance(method, OneLora) else POSTERIOR).cohorts) > 1
    assert same(method.run(narrow, 0), method.run(batch, 0), tolerance=1e-9)


def test_a_stack_without_a_merge_trains_like_the_stack_of_the_calibration(trusting):
    """Otherwise, the row "no merge" would compare two kinds of training."""
    base, bank = trusting
    gain = Gain(shots=4, people=9, mean=0.1, low=0.05, high=0.15, worse=0.0)
    found = CalibrationInfo(ridge=0.3, prior=8.0, rate=1e-2, people=9, gains=(gain,), stacked=(gain,))
    info = bank.info.model_copy(
        update={"calibration": found, "run": bank.info.run.model_copy(update={"stack": StackSettings(lora=SHAPE)})}
    )
    calibrated, people = replace(bank, info=info), people_of(3, prefix="x", seed=7)

    def on(run: Run) -> TestBatch:
        return TestBatch.of(Context(base, calibrated, HashEncoder(), run), people, shots=SHOTS, queries=QUERIES)

    stack = StackSettings(lora=SHAPE, training=Training(lr=0.5, steps=3), calibrated=True)
    run = Run(memory="64MiB", merge=MergeSettings(), stack=stack)
    adapt_only = OneLora(name="adapt only", lora=SHAPE)
    expected = OneLora(lora=SHAPE, training=one_step(1e-2)).run(on(run), 0)
    assert same(adapt_only.run(on(run), 0), expected)
    own = run.model_copy(update={"stack": stack.model_copy(update={"calibrated": False})})
    assert not same(adapt_only.run(on(own), 0), expected)


@pytest.mark.parametrize("budget", [1, 7])
def test_prime_evaluates_each_person_as_often_as_its_budget_says(tiny, monkeypatch, budget):
    losses, calls = Prime._losses, []

    def counted(*words):
        calls.append(1)
        return losses(*words)

    monkeypatch.setattr(Prime, "_losses", staticmethod(counted))
    found = Prime(k=2, budget=budget).run(batch_of(tiny), 0)
    assert len(calls) == budget
    assert torch.isfinite(found.merge.w).all()
