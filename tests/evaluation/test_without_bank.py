"""The rows of a comparison that need no bank, against their plain computation."""

from dataclasses import replace

import pytest
import torch
from arrays import near
from builds import changed
from compared import comparison_of, rated
from conftest import people_of

from mta.bank.calibration.info import ALONE, LABEL_BIAS, OPPU, CalibrationInfo, Gain, Rival, one_step
from mta.bank.calibration.label_bias import features_of, fitted_bias
from mta.config import MergeSettings, Training
from mta.evaluation.compare import run_methods
from mta.evaluation.context import Context
from mta.evaluation.methods import CalibratedLora, LabelBias, MergeThenAdapt, OneLora, TaskLora
from mta.evaluation.protocol import TestBatch
from mta.evaluation.reports.summary import verdict
from mta.evaluation.reports.tables import rows_of
from mta.training.scoring import label_scores

GAIN = Gain(shots=8, people=9, mean=0.1, low=0.05, high=0.15, worse=0.0)
TRAINING = Training(lr=1e-2, steps=2)


def batch_of(tiny, **settings):
    """A batch over a bank whose calibration found these settings of rivals."""
    base, bank = tiny
    rivals = tuple(Rival(name=name, setting=value, gain=GAIN, ahead=GAIN) for name, value in settings.items())
    info = CalibrationInfo(ridge=1.0, prior=4.0, rivals=rivals) if rivals else None
    known = replace(bank, info=bank.info.model_copy(update={"calibration": info}))
    context = Context(base, known, None, known.info.run)
    return TestBatch.of(context, people_of(5, items=9, prefix="new-"), shots=4, queries=3)


@pytest.mark.parametrize(("settings", "std"), [({LABEL_BIAS: 2.0}, 2.0), ({}, 0.5)])
def test_a_label_bias_moves_the_pooled_models_answers(tiny, settings, std):
    batch = batch_of(tiny, **settings)
    base, task, over = batch.base, batch.task, batch.bank.task_adapters
    found = LabelBias().run(batch, 0)
    assert found.bytes_per_person == 8
    for person, queries, answers in zip(batch.people, batch.queries, found.answers):
        (shots,), (asked,) = (label_scores(base, task, [items], over) for items in (person.items, queries))
        gold = torch.tensor([task.labels.index(task.target(item)) for item in person.items])
        expected = asked + fitted_bias(shots, gold, features_of(task.labels), std)
        near(answers.scores.log_softmax(1), expected.log_softmax(1))
        lengths = [len(base.prompts.prompt(task, query).tokens) for query in queries]
        assert answers.prompt_tokens == sum(lengths) / len(lengths)


def test_a_bias_without_a_gain_is_the_pooled_model(tiny):
    batch = batch_of(tiny, **{LABEL_BIAS: 0.0, OPPU: 0.0})
    expected = [answers.scores.log_softmax(1) for answers in TaskLora().run(batch, 0).answers]
    for method in (LabelBias(), CalibratedLora()):
        for answers, own in zip(method.run(batch, 0).answers, expected):
            near(answers.scores.log_softmax(1), own)


@pytest.mark.parametrize("name", [ALONE, OPPU])
@pytest.mark.parametrize(("setting", "training"), [({}, TRAINING), ({"rate": 3e-3}, one_step(3e-3))])
def test_a_lora_alone_is_trained_as_its_calibration_says(tiny, name, setting, training):
    batch = batch_of(tiny, **({name: setting["rate"]} if setting else {}))
    run = batch.bank.info.run
    shape, calibrated = run.stack.lora if name == ALONE else run.bank.lora, changed("stack", run, calibrated=True).stack
    rows = run_methods(
        batch,
        [
            CalibratedLora(name=name, shape="stack" if name == ALONE else "anchor", training=TRAINING),
            OneLora(lora=shape, training=training, name="own"),
            MergeThenAdapt(merge=MergeSettings(policy="none"), stack=calibrated, name="over no merge"),
        ],
    )
    if setting and name == ALONE:
        near(rows.row(name).people["NLL"], rows.row("over no merge").people["NLL"])
    near(rows.row(name).people["NLL"], rows.row("own").people["NLL"])
    assert rows.row(name).bytes_per_person == rows.row("own").bytes_per_person


@pytest.mark.parametrize(
    ("bias", "rank", "advised"), [(0.6, 0.0, [LABEL_BIAS]), (0.6, 0.6, [LABEL_BIAS, ALONE]), (0.0, 0.0, [])]
)
def test_a_comparison_advises_a_rival_that_is_as_good(task, bias, rank, advised):
    found = comparison_of(task, gain=0.6)
    found.rows.extend([rated(task, LABEL_BIAS, gain=bias, seed=4), rated(task, ALONE, gain=rank, seed=5)])
    said = verdict(found)
    advice = [sentence for sentence in said if "without a bank, use that" in sentence]
    expected = f"In NLL, MTA is not clearly better than {' and '.join(advised)}: without a bank, use that."
    assert advice == ([expected] if advised else [])
    assert any(sentence.startswith("NLL: MTA is") and LABEL_BIAS in sentence for sentence in said)
    heads, _ = rows_of(found)
    assert {f"NLL against {LABEL_BIAS}", f"NLL against {ALONE}"} <= set(heads)


def test_loras_of_two_shapes_are_two_methods():
    """Outcomes and records of an experiment are kept by class and settings, without names."""
    assert CalibratedLora(name=ALONE, shape="stack").digest != CalibratedLora(name=OPPU).digest
