"""With vLLM the gateway loads no weights; the personalizer loads them for its first job."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, HashEncoder, people_of, personalizer
from contract import World
from safetensors.torch import save_file
from typer.testing import CliRunner

from mta.cli.app import app
from mta.cli.options import open_bank
from mta.errors import ModelError, UnsupportedModel
from mta.model.base import BaseModel
from mta.serving.api.auth import Keys
from mta.serving.api.jobs import Jobs
from mta.serving.launch import service_of, vllm_settings
from mta.serving.vllm.server import VllmNotStarted, VllmServer, VllmSettings
from mta.store import Store


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("outline"))


def materialized(base):
    """Parameters and buffers of the model that use memory."""
    tensors = (*base.model.named_parameters(), *base.model.named_buffers())
    return [name for name, tensor in tensors if tensor.device.type != "meta"]


def test_an_outline_describes_the_base_and_holds_no_weights(world):
    (Path(world.place) / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    run = TINY_RUN.model_copy(update={"base": world.place, "dtype": "float32", "max_tokens": 200})
    outline, loaded = BaseModel.outline(run), BaseModel.of(run)
    assert materialized(outline) == []
    assert not outline.has_weights
    assert loaded.has_weights
    for name in ("fingerprint", "name", "targets", "dtype", "stop_tokens", "pad_token", "note"):
        assert getattr(outline, name) == getattr(loaded, name), name
    assert outline.stop_tokens == [2, 7]
    assert outline.prompts.max_tokens == 200
    assert outline.prompts.chat([{"role": "user", "content": "a"}]) == loaded.prompts.chat(
        [{"role": "user", "content": "a"}]
    )


def test_only_a_strict_gateway_watches_its_bank(world, tmp_path):
    base, bank, run = open_bank(world.folder / "bank", weights=False)
    for strict, watched in ((True, (bank.folder, bank.hash)), (False, None)):
        remote = VllmServer(VllmSettings(sys.executable, "base", "bank", "people", 64))
        service = service_of(base, bank, run, str(tmp_path / "people"), Keys(), vllm=remote, strict=strict)
        assert service.strict_bank == watched


@pytest.mark.parametrize(("slots", "own"), [(32, 8), (8, 2), (4, 1), (1, 1)])
def test_a_persons_key_gets_at_most_a_quarter_of_the_slots(world, tmp_path, slots, own):
    base, bank, run = open_bank(world.folder / "bank", weights=False)
    remote = VllmServer(VllmSettings(sys.executable, "base", "bank", "people", 64))
    service = service_of(base, bank, run, str(tmp_path / "people"), Keys(), vllm=remote, slots=slots)
    assert service.limits.own == own


@pytest.mark.anyio
async def test_the_gateway_with_vllm_loads_weights_only_for_the_first_training_job(world, tmp_path):
    base, bank, run = open_bank(world.folder / "bank", weights=False)
    assert vllm_settings("python", base, bank.folder, "people", slots=2, args="").args == ("--dtype=float32",)
    remote = VllmServer(VllmSettings(sys.executable, "base", "bank", "people", 64))
    service = service_of(base, bank, run, str(tmp_path / "people"), Keys(), vllm=remote)
    jobs, (ann,) = service.jobs, people_of(1, prefix="ann")
    assert materialized(service.base) == materialized(jobs.personal.base) == []
    await jobs.forget("nobody")  # needs none
    assert jobs._trainer is None
    load = jobs._load

    def with_encoder():
        personal = load()
        personal._encoder = HashEncoder()  # the tiny bank's, which cannot be loaded by name
        return personal

    jobs._load = with_encoder
    jobs.put(ann, service.store.session())
    await asyncio.wait_for(jobs._working, 120)
    assert jobs.status(ann.id).state == "done", jobs.status(ann.id)
    assert materialized(service.base) == []
    await jobs.close()
    await service.engine.close()
    state = service.store.load(ann.id)
    assert state.bank == bank.hash
    assert all(part.device.type == "cpu" for pair in state.stack.factors.values() for part in pair)


def test_unloadable_weights_fail_a_job_and_are_tried_again_for_the_next(world, tmp_path):
    tries = []

    def load():
        tries.append(None)
        raise torch.OutOfMemoryError

    jobs = Jobs(personalizer(world.base, world.bank, tmp_path / "people"), load=load)
    for count in (1, 2):
        found = jobs._personalize(people_of(3), Store(tmp_path / "people").session())
        assert {(status.state, status.message) for status in found.values()} == {("failed", "OutOfMemoryError")}
        assert len(found) == 3
        assert len(tries) == count
    asyncio.run(jobs.close())


def test_mta_serve_with_vllm_loads_no_weights(world, tmp_path, monkeypatch):
    """``false`` is not vLLM, so the error comes after the base was opened."""

    def load(*_, **__):
        raise AssertionError("weights were loaded")

    world.renew("somebody", 1)
    monkeypatch.setattr(BaseModel, "load", load)
    words = ["serve", "--bank", world.folder / "bank", "--store", world.folder / "people", "--insecure-local"]
    done = CliRunner().invoke(app, [str(word) for word in (*words, "--port", 0, "--vllm", "false")])
    assert isinstance(done.exception, VllmNotStarted)


def test_an_outline_of_an_invalid_base_is_refused(world, tmp_path):
    run = TINY_RUN.model_copy(update={"base": str(tmp_path)})
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        BaseModel.outline(run)
    save_file({}, tmp_path / "model.safetensors")
    config = json.loads((Path(world.place) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UnsupportedModel, match="quantized"):
        BaseModel.outline(run)
