"""The whole walk on the device given by ``pytest --device cuda`` (the CPU without it), held against the CPU."""

import asyncio
from contextlib import nullcontext
from types import MethodType

import pytest
import torch
from conftest import TINY_RUN, HashEncoder, people_of, stopped_when
from tiny import KINDS, base_of, random_examples, tokenizer, without_kernels

from mta import BASE, TASK
from mta.bank.bank import Bank
from mta.config import MergeSettings, Training, plugins
from mta.evaluation import Context, TestBatch, run_methods
from mta.evaluation.methods import Merged, MergeThenAdapt, TaskLora
from mta.lora.batch import fresh
from mta.model.base import BaseModel
from mta.personalize import Personalizer
from mta.personalize.shots import shots_of
from mta.serving.embedded.engine import EmbeddedEngine
from mta.serving.engine import EngineRequest
from mta.store import Store
from mta.system.device import pick_device
from mta.training.checkpoint import Checkpoint
from mta.training.gates import gate_gradients
from mta.training.trainer import Job, train_loras

QUESTION = {"title": "Film 7", "genres": "Drama"}
PEOPLE = people_of(3, items=6, prefix="x", seed=5)

pytestmark = pytest.mark.integration


@pytest.fixture(scope="session")
def device(pytestconfig):
    """The device asked for. One that cannot be used is an error: skipped tests would look like a pass."""
    return pick_device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session")
def walked(device, tmp_path_factory):
    """Base, bank and people who were personalized, on the device; on a CPU without kernels, as on every device."""
    with without_kernels() if device.type == "cpu" else nullcontext():
        return walk(device, tmp_path_factory.mktemp("device") / "bank")


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The same on the CPU."""
    return walk(torch.device("cpu"), tmp_path_factory.mktemp("cpu") / "bank")


def walk(device, folder):
    base = base_of()
    for module in base.model.modules():  # in float32, sines of two devices differ by one bit
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = MethodType(rotary, module)
    base.model.to(device)
    parts = {"task_people": people_of(4, prefix="t"), "encoder": HashEncoder()}
    bank = Bank.build(base, people_of(12, prefix="c"), folder, task="movielens-rating", run=TINY_RUN, **parts)
    personal = Personalizer(base, bank, run=TINY_RUN, encoder=HashEncoder())
    personal.personalize(PEOPLE)
    return personal


def rotary(self, x, position_ids):
    """Rotary positions in the type of ``x``."""
    angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x)
    both = torch.cat((angles, angles), -1)
    return both.cos(), both.sin()


def close(found, expected, tolerance=1e-7):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)  # the bank itself is kept in float32


def test_a_bank_is_the_same(walked, reference):
    for name, tensor in walked.bank.anchors.tensors().items():
        close(tensor, reference.bank.anchors.tensors()[name])


def test_people_are_the_same(walked, reference):
    for person in PEOPLE:
        found, expected = walked.state(person.id), reference.state(person.id)
        assert found.anchors == expected.anchors
        assert found.w == pytest.approx(expected.w, rel=0, abs=1e-7)
        for name, tensor in found.stack.tensors().items():
            close(tensor, expected.stack.tensors()[name])


def test_answers_and_scores_are_the_same(walked, reference):
    models = ["x0", BASE, "x2", TASK]
    rows = [(who, QUESTION, "4") for who in models]
    assert walked.score(rows) == pytest.approx(reference.score(rows), rel=0, abs=1e-6)
    asked = [(who, QUESTION) for who in models]
    assert walked.generate(asked, max_new_tokens=5) == reference.generate(asked, max_new_tokens=5)


def test_an_export_is_the_same(walked, reference, tmp_path):
    from mta.lora.peft import read_peft

    for name, personal in (("here", walked), ("there", reference)):
        personal.export("x1", tmp_path / name)
    expected = read_peft(tmp_path / "there").tensors()
    for name, tensor in read_peft(tmp_path / "here").tensors().items():
        close(tensor, expected[name])


OF_THE_LAB = [name for name in ("ridge", "learned") if name in plugins.names("mta.policies")]  # if it is installed


@pytest.mark.parametrize("policy", ["posterior", "similarity", "laplace", *OF_THE_LAB])
def test_methods_measure_the_same(walked, reference, policy):
    settings = MergeSettings(policy=policy)
    scores = []
    for personal in (walked, reference):
        context = Context(personal.base, personal.bank, HashEncoder(), TINY_RUN)
        batch = TestBatch.of(context, PEOPLE, shots=3, queries=3)
        methods = [
            TaskLora(),
            Merged(name="merge", merge=settings),
            MergeThenAdapt(name="MTA", merge=settings, stack=TINY_RUN.stack),
        ]
        scores.append([row.people["NLL"] for row in run_methods(batch, methods).rows])
    for found, expected in zip(*scores):
        close(found, expected, 1e-7)


def test_gradients_of_the_coefficients_are_the_same(walked, reference):
    found = []
    for personal in (walked, reference):
        base, bank = personal.base, personal.bank
        jobs = [shots_of(base, bank.task, person) for person in PEOPLE]
        found.append(gate_gradients(base, jobs, bank.device_anchors, bank.calibration.mu, bank.task_adapters))
    close(found[0].gradients, found[1].gradients)
    close(found[0].loglik, found[1].loglik)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_training_in_bfloat16_is_the_same_with_gradient_checkpointing(device, kind):
    jobs, found, calls = [Job(f"p{n}", random_examples(3, n)) for n in range(3)], [], []
    training = Training(lr=0.05, steps=2, batch_size=3, eps=1.0)
    for checkpointing in (False, True):
        torch.manual_seed(0)
        with device:  # no module gets a kernel of the CPU
            model = KINDS[kind]().to(torch.bfloat16)
        base = BaseModel(model, tokenizer(), kind, gradient_checkpointing=checkpointing)
        assert base.blocked
        base.model.get_submodule(next(iter(base.targets))).register_forward_hook(
            lambda *_, on=checkpointing: calls.append(on)
        )
        start = fresh(base.targets, 4, 2.0, 0, [job.key for job in jobs]).to(base.device)
        after = train_loras(base, jobs, start, training).tensors()
        found.append(torch.cat([(after[name] - tensor).flatten() for name, tensor in start.tensors().items()]))
    assert calls.count(True) == 2 * calls.count(False) == 2 * training.steps
    assert found[0].norm() > 0
    assert (found[1] - found[0]).norm() <= 0.02 * found[0].norm()


def test_an_engine_answers_the_same(walked, reference, tmp_path):
    def answers(personal, folder):
        async def go():
            engine = EmbeddedEngine(personal.base.twin(), personal.bank, Store(folder), slots=2, length=64)
            try:
                asks = [EngineRequest(tuple(range(10, 30)), who, 5) for who in (BASE, TASK)]
                return [[piece.token.id async for piece in engine.answer(ask) if piece.token] for ask in asks]
            finally:
                await engine.close()

        return asyncio.run(go())

    assert answers(walked, tmp_path / "here") == answers(reference, tmp_path / "there")


def test_an_interrupted_run_resumes_to_the_same_states(walked, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(Checkpoint, "due", lambda _: True)  # after each step
    how = {"store": Store(tmp_path), "run": TINY_RUN, "encoder": HashEncoder()}
    with stopped_when(lambda stage, step: (stage, step.step) == ("stack", 2)) as stop:
        Personalizer(walked.base, walked.bank, **how).personalize(PEOPLE, on_step=stop)
    again = Personalizer(walked.base, walked.bank, **how)
    again.personalize(PEOPLE, on_step=lambda stage, step: steps.append(step.step) if stage == "stack" else None)
    assert steps[0] == 2  # the first is restored
    for person in PEOPLE:
        for name, tensor in again.state(person.id).stack.tensors().items():
            close(tensor, walked.state(person.id).stack.tensors()[name])
