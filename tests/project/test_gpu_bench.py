"""``python -m benchmarks.gpu``: shapes, the plan, and a rehearsal of every row on the CPU."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from memory import TensorMemory
from tiny import without_kernels

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.rows import PARTS, Planned, rows
from benchmarks.gpu.shapes import SHAPES, jobs_of
from benchmarks.gpu.site import Site
from benchmarks.gpu.steps import planned_bytes
from benchmarks.speed.adaptation import against_peer
from benchmarks.speed.peers import PlainPeft
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Row
from benchmarks.speed.training import Cohort, oppu
from mta.config import Training

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_shape_has_the_weights_of_its_model(shape):
    model = shape.model(torch.device("meta"), torch.bfloat16)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert shape.parameters == pytest.approx(weights, rel=1e-3)
    billions = {"135M": 0.135, "1B": 1.24, "4B": 4.02, "8B": 8.03}[shape.name.rpartition("-")[2]]
    assert weights / 1e9 == pytest.approx(billions, rel=0.01)


def test_examples_share_their_beginning_and_have_the_length_asked_for():
    (job, other) = jobs_of(SHAPES[0], people=2, examples=3, tokens=20, shared=8)
    assert {len(example.tokens) for example in (*job.examples, *other.examples)} == {20}
    assert {len(example.target) for example in job.examples} == {2}
    assert len({example.tokens[:8] for example in (*job.examples, *other.examples)}) == 1
    assert len({example.tokens for example in (*job.examples, *other.examples)}) == 6


def site_of(device="cpu", shape=SHAPES[0]):
    return Site(shape.tiny(), torch.device(device), torch.bfloat16, 2**30, Settings(quick=True))


def test_a_row_that_fails_keeps_its_name_and_the_others_are_measured(monkeypatch):
    failing = Mock(side_effect=RuntimeError("CUDA error: device-side assert triggered"))
    plan = [Planned("first", failing), Planned("second", lambda: Row("second", "mta", "peer"))]
    monkeypatch.setitem(PARTS, "training", lambda site: plan)
    found = {row.name: row.skipped for row in rows(site_of(), "training")}
    assert found == {"first": "failed: RuntimeError: CUDA error: device-side assert triggered", "second": ""}


def test_people_who_get_the_adapters_of_others_are_found(monkeypatch):
    site = replace(site_of(), dtype=torch.float32)
    jobs = jobs_of(site.shape, people=3, examples=2, tokens=24, shared=8)
    cohort = oppu(site.base, jobs, Training(lr=1e-4, steps=1, batch_size=2), site.memory)
    plain = PlainPeft(site.plain(), cohort.start.select([0]))
    assert against_peer(cohort, plain, 3) < 1e-3
    right = Cohort.gradient
    monkeypatch.setattr(Cohort, "gradient", lambda self: (right(self)[0], right(self)[1].select([1, 0, 2])))
    assert against_peer(cohort, plain, 3) > 0.1


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_memory_of_a_cohort_is_planned(checkpointed):
    shape = replace(SHAPES[1], hidden=256, layers=4, heads=4, keys=2, head=64, inner=896, vocabulary=4096)
    with without_kernels():  # as on a GPU
        base = shape.base(torch.device("cpu"), torch.bfloat16, checkpointed)
        jobs = jobs_of(shape, people=4, examples=8, tokens=70, shared=35)
        cohort = oppu(base, jobs, Training(lr=1e-4, steps=1, batch_size=8), 2**34)
        for some, tokens in ((cohort.first(1), 2**20), (cohort, 600)):
            starts = [tensor for one in (cohort, some) for tensor in one.start.parts().values()]
            with TensorMemory([*base.model.parameters(), *base.model.buffers(), *starts]) as memory:
                some.train(tokens_per_batch=tokens)
            assert memory.peak == pytest.approx(planned_bytes(some, tokens), rel=0.05)


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("failing_step", ["doctor", "pytest", "benchmarks.gpu", "none"])
def test_make_gpu_runs_all_steps_with_a_given_python_and_fails_if_one_failed(tmp_path, failing_step):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$MTA_KERNELS $@" >> {tmp_path}/steps\ncase "$*" in *{failing_step}*) exit 1;; esac\n'
    )
    python.chmod(0o755)
    words = [f"GPU_PYTHON={python}", "OUT=here", "GPU_ARGS=--people 4", f"VENV={tmp_path}/venv"]
    done = subprocess.run(["make", "gpu", *words], cwd=ROOT, capture_output=True)
    doctor, tests, bench = (tmp_path / "steps").read_text().splitlines()
    assert (done.returncode == 0) == (failing_step == "none")
    assert doctor == "off -m mta doctor --device cuda"
    assert tests.startswith("off -m pytest")
    assert "--device cuda --junitxml here/tests-on-cuda.xml" in tests
    assert bench.startswith("off -m benchmarks.gpu --device cuda --out here --budget 480")
    assert bench.endswith("--people 4")
    assert not (tmp_path / "venv").exists()


@pytest.mark.integration
def test_a_rehearsal_prints_and_writes_every_row(tmp_path, capsys):
    words = ["--device", "cpu", "--quick", "--shapes", "Llama-3.2-1B", "--out", str(tmp_path)]
    assert main([*words, "--only", "coefficients"]) == 0
    assert main([*words, "--only", "training", "merging", "decoding", "curve"]) == 0
    (path,) = tmp_path.glob("bench-cpu-rehearsal.json")
    found = json.loads(path.read_text())
    names = [row["name"].removeprefix("Llama-3.2-1B, ") for row in found["rows"]]
    assert names.count("base") == 1
    short = "rank 8 (OPPU), 8 shots of 70 tokens"
    assert {"coefficients of 4 anchors", short, f"{short}, operations", f"{short}, memory"} <= {*names}
    assert {f"{short}, best batch of PEFT", f"{short}, memory of a cohort", f"{short}, MoE-PEFT"} <= {*names}
    assert {"exact merge against PEFT cat", "rank 8 (OPPU), 64 tokens a person"} <= {*names}
    assert {"decoding against the base alone", "decoding against PEFT adapter_names"} <= {*names}
    assert not [row for row in found["rows"] if row["skipped"].startswith("failed")]
    assert capsys.readouterr().out.count("Llama-3.2-1B") >= len(names)
