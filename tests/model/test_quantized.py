"""Quantized bases: they compute with the restored weights, take less memory, and belong to their own banks."""

from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, HashEncoder, people_of
from hub import Repo
from hub import hub as hub  # the fixture
from tiny import random_examples, random_loras, save_base, tokenizer

from mta.bank.bank import Bank
from mta.config import Training
from mta.data.tasks import load_task
from mta.errors import BankMismatch, ConfigError, MissingExtra, ModelError, UnsupportedModel
from mta.kernels.linear import bits_of, weight_of
from mta.lora.batch import fresh
from mta.lora.layers import PerPerson, Shared
from mta.model.base import BaseModel
from mta.personalize import Personalizer
from mta.tools.cost import WEIGHT
from mta.training.gates import gate_gradients
from mta.training.scoring import log_likelihood
from mta.training.trainer import Job, train_loras

pytest.importorskip("bitsandbytes", reason="the extra 'quantize' is not installed")

NAME, TASK = "somebody/model", load_task("movielens-rating")
BOTH = pytest.mark.parametrize("kind", ["nf4", "int8"])
JOBS = [Job(f"person-{n}", random_examples(n + 2, seed=n)) for n in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def load(folder, quantize="none", device="cpu") -> BaseModel:
    return BaseModel.load(folder, "float32", device, max_tokens=400, quantize=quantize)


def restored(base: BaseModel, folder) -> BaseModel:
    """A plain base with the weights that a quantized one computes with."""
    plain = load(folder, device=str(base.device))
    for name, layer in base.model.named_modules():
        if bits_of(layer):
            plain.model.get_submodule(name).weight.data.copy_(weight_of(layer))
    return plain


def near(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@BOTH
def test_training_and_scores_are_those_of_the_restored_weights(folder, kind, pytestconfig):
    base = load(folder, kind, pytestconfig.getoption("--device"))
    plain, below = restored(base, folder), [Shared(random_loras(load(folder), 1, size=0.05).to(base.device))]
    assert (
        [bits_of(layer) for layer in base.model.modules()].count(4 if kind == "nf4" else 8) == len(base.targets) == 14
    )
    assert (base.packable, base.blocked) == (plain.packable, plain.blocked)
    start = fresh(plain.targets, 2, 4.0, 0, [job.key for job in JOBS], torch.float32)
    how = Training(lr=1e-2, steps=3, batch_size=3)
    ours, theirs = (train_loras(one, JOBS, start, how, frozen=below) for one in (base, plain))
    for name in plain.targets:
        near(ours.factors[name], theirs.factors[name])
    assert ours.factors["model.layers.0.self_attn.q_proj"].b.abs().max() > 1e-3
    examples = [job.examples for job in JOBS]
    near(*(log_likelihood(one, examples, [*below, PerPerson(ours)]) for one in (base, plain)))


@BOTH
def test_gradients_in_coefficients_are_those_of_the_restored_weights(folder, kind):
    base, anchors = load(folder, kind), random_loras(load(folder), 3)
    for at in (torch.zeros(3), torch.tensor([0.1, -0.2, 0.3])):
        near(*(gate_gradients(one, JOBS, anchors, at).gradients for one in (base, restored(base, folder))))


@BOTH
def test_a_layer_without_adapters_has_the_gradient_of_the_restored_weights(folder, kind):
    base = load(folder, kind)
    name = next(iter(base.targets))
    layer, other = (one.model.get_submodule(name) for one in (base, restored(base, folder)))
    found = []
    for one in (layer, other):
        x = torch.linspace(-1, 1, 32).view(2, 16).requires_grad_()
        one(x).pow(2).sum().backward()
        found.append(x.grad)
    near(*found)


@BOTH
def test_linear_layers_take_the_planned_bytes(tmp_path, kind):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=260, **sizes)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    base = load(tmp_path, kind)
    taken = 0
    for layer in filter(bits_of, base.model.modules()):
        weight, state = layer.weight, getattr(layer.weight, "quant_state", None)
        scales = [weight.SCB] if state is None else [state.absmax, state.state2.absmax]
        taken += sum(tensor.numel() * tensor.element_size() for tensor in (weight.data, *scales))
    assert taken == pytest.approx(WEIGHT[kind] * sum(d * o for d, o in base.targets.values()), rel=0.15)


@BOTH
def test_stored_quantized_weights_compute_the_same(folder, tmp_path, kind):
    base = load(folder, kind)
    base.model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    stored, examples = load(tmp_path), [job.examples for job in JOBS]
    near(*(log_likelihood(one, examples) for one in (base, stored)))
    with pytest.raises(UnsupportedModel, match="quantized by bitsandbytes already"):
        load(tmp_path, kind)


@pytest.fixture(params=["folder", "hub"])
def place(request, folder):
    if request.param == "folder":
        return str(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    request.getfixturevalue("hub").repos[NAME] = Repo(False, commits={"0" * 40: files})
    return NAME


def test_a_bank_is_built_and_people_are_personalized_over_four_bits(place, folder, tmp_path):
    served = pytest.importorskip("served").served  # not installed everywhere that `make gpu` runs
    launch = pytest.importorskip("mta.serving.launch")
    base = load(place, "nf4")
    run = TINY_RUN.model_copy(update={"base": place, "dtype": "float32", "quantize": "nf4"})
    people, encoder = people_of(12, prefix="c"), HashEncoder()
    bank = Bank.build(base, people, tmp_path / "bank", task=TASK, run=run, encoder=encoder)
    assert bank.info.run.quantize == "nf4"
    again = BaseModel.of(bank.info.run.model_copy(update={"device": "cpu"}))  # as a worker or a later command does
    assert again.fingerprint == base.fingerprint != load(place).fingerprint
    personal = Personalizer(again, bank, tmp_path / "people", run=bank.info.run, encoder=encoder)
    new = people_of(2, prefix="new")
    assert personal.personalize(new).failed == {}
    question, person = {"title": "A", "genres": "Drama"}, new[0].id
    shares = personal.shares([(person, question)])[0]
    with served(again, bank, tmp_path, store=personal.store) as here, here.http("admin") as http:
        body = {"model": f"person:{person}", "input": TASK.prompt(TASK.asked(question))}
        found = http.post("/v1/classify", json=body).json()
    assert dict(zip(found["labels"], found["data"][0]["probs"])) == pytest.approx(shares, abs=1e-4)
    personal.export(person, tmp_path / "out")
    with pytest.raises(BankMismatch, match=r"was built for base .*, quantize=nf4 \(sha256"):
        Bank.open(bank.folder, load(place))
    with pytest.raises(ConfigError, match="vLLM loads the base unquantized"):
        launch.vllm_settings("python3", base, bank.folder, "people", slots=1, args="")


def test_what_cannot_be_quantized_is_refused(folder, monkeypatch):
    with pytest.raises(ModelError, match="quantize is 'int4'; expected one of none, nf4, int8"):
        load(folder, "int4")
    with pytest.raises(UnsupportedModel, match="no weights for float64"):
        BaseModel.load(folder, "float64", "cpu", quantize="nf4")
    monkeypatch.setattr("mta.system.extras.find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match="belongs to the extra 'quantize'"):
        load(folder, "nf4")
