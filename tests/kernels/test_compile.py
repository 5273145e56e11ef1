"""How kernels are compiled, loaded and switched off, on machines as they are."""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import base_of, random_examples, random_loras, without_kernels

import mta.kernels.compile as module
from mta.config import Training
from mta.errors import ConfigError
from mta.kernels.compile import FAMILIES, kernels, obstacle
from mta.lora.layers import PerPerson
from mta.model.generate import generate
from mta.training.scoring import log_likelihood
from mta.training.trainer import Job, train_loras

needs_kernels = pytest.mark.skipif(bool(obstacle()), reason=f"no kernels here: {obstacle()}")
TOO_OLD = """#!/bin/sh
echo "In file included from kernels.cpp:6:" >&2
echo "{folder}/low_rank.hpp:41:10: error: '__builtin_shufflevector' was not declared in this scope" >&2
echo "low_rank.hpp:42:10: error: something else" >&2
exit 1
"""


def compiler(folder: Path, script: str) -> Path:
    """A g++ in ``folder`` that is this shell script."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "g++"
    path.write_text(script)
    path.chmod(0o755)
    return path


@pytest.fixture
def unloaded(monkeypatch):
    """The module as a new process has it."""
    monkeypatch.setattr(module, "_library", functools.cache(module._library.__wrapped__))


@needs_kernels
@pytest.mark.integration
def test_processes_that_start_at_once_all_get_kernels_that_one_of_them_compiled(tmp_path):
    log = tmp_path / "log"
    real = shutil.which("g++")
    compiler(tmp_path / "bin", f'#!/bin/sh\necho "$@" >> {log}\nexec {real} "$@" -O0\n')  # fast to compile
    code = (
        "import sys, torch, mta.kernels.compile as k\nfrom mta.kernels.functions import product\n"
        "print('ready', flush=True); sys.stdin.readline(); x = torch.ones(1, 2)\n"
        "print(product(x, x), k.kernels('norm', x) is not None, len(k.kernels('attention', x.bfloat16())))"
    )
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "MTA_CACHE": str(tmp_path / "cache")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([sys.executable, "-c", code], env=env, **pipes) for _ in range(3)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        said, wrong = worker.communicate(timeout=300)
        assert (said, wrong) == ("tensor([[2.]]) True 5\n", "")
    steps = [line for line in log.read_text().splitlines() if "--version" not in line]
    assert sum("-shared" in line for line in steps) == 1
    assert sorted(part for line in steps for part in line.split() if part.startswith("-DNUMBER")) == [
        "-DNUMBER=bf16",
        "-DNUMBER=double",
        "-DNUMBER=float",
    ]
    kept = sorted(path.suffix for path in (tmp_path / "cache" / "kernels").iterdir())
    assert kept in ([".lock", ".so"], [".so"])


@needs_kernels
def test_a_failing_compiler_is_logged_once_and_no_kernel_is_used(tmp_path, monkeypatch, unloaded, cache, caplog):
    script = TOO_OLD.format(folder=Path(module.__file__).parent)
    monkeypatch.setenv("PATH", str(compiler(tmp_path / "bin", script).parent), prepend=os.pathsep)
    monkeypatch.setattr(module, "_version", lambda _: 12)
    error = "low_rank.hpp:41:10: error: '__builtin_shufflevector' was not declared in this scope"
    assert [kernels(name, torch.zeros(1)) for name in ("norm", "rotate")] == [None, None]
    assert module.failure() == error
    assert caplog.text.count(error) == 1
    assert not list((cache / "kernels").glob("*.so*"))


@pytest.mark.parametrize(("name", "value"), [("MTA_KERNELS", "off"), ("PATH", "/nowhere")])
def test_without_a_compiler_no_kernel_is_used(monkeypatch, unloaded, name, value):
    monkeypatch.setenv(name, value)
    assert kernels("norm", torch.zeros(1)) is None


@pytest.mark.parametrize(("machine", "vectors"), [("x86_64", True), ("aarch64", False)])
def test_the_compiler_is_given_only_flags_of_the_machine(monkeypatch, machine, vectors):
    monkeypatch.setattr(module.platform, "machine", lambda: machine)
    assert any(flag.startswith("-mprefer-vector-width") for flag in module._flags()) == vectors
    assert "x86" not in obstacle()


@needs_kernels
@pytest.mark.parametrize(("said", "reason"), [("11", "g++ 11 is older than 12"), ("9.4.0", "g++ 9 is older than 12")])
def test_an_old_compiler_is_named_with_its_version(monkeypatch, tmp_path, said, reason):
    script = f'#!/bin/sh\n[ "$1" = -dumpversion ] && echo {said}\n'
    monkeypatch.setenv("PATH", str(compiler(tmp_path, script).parent), prepend=os.pathsep)
    assert obstacle() == reason


@pytest.mark.parametrize("own", ["torch/lib/libgomp.so.1", "torch.libs/libgomp-a34b3233.so.1.0.0"])
def test_the_openmp_runtime_is_torchs_own_also_in_a_folder_with_a_space(monkeypatch, tmp_path, own):
    site = tmp_path / "my environment"
    others = ["scikit_learn.libs/libgomp-6e1a1d1b.so.1.0.0", "torch/lib/libtorch_cpu.so", own]
    rows = ["7f36-7f37 rw-p 00000000 00:00 0 "] + [f"7f38-7f39 r-xp 0000 fe:00 53   {site / name}" for name in others]
    (tmp_path / "maps").write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(torch, "__file__", str(site / "torch" / "__init__.py"))
    assert module._openmp(tmp_path / "maps") == str(site / own)
    (tmp_path / "maps").write_text("\n".join(rows[:-1]) + "\n")
    assert module._openmp(tmp_path / "maps") == str(site / others[0])
    assert module._openmp(tmp_path / "none") == ""


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_kernel_of_the_library_belongs_to_one_family(dtype):
    library = ctypes.CDLL(str(module._compiled(shutil.which("g++"), module._openmp())))
    named = [name for names in FAMILIES.values() for name in names]
    assert sorted(module._table(library, dtype)) == sorted(named)
    assert len(set(named)) == len(named)


@needs_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_is_switched_off_changes_no_result(family, dtype, tolerance):
    """Of scoring, training, and decoding: between them, these use every family."""
    base = base_of("llama", dtype=dtype)
    examples = [random_examples(5, 1), random_examples(3, 2)]
    loras, training = random_loras(base, 2), Training(lr=1e-2, steps=2, batch_size=8, eps=1e-3)

    def results():
        jobs = [Job(str(n), one) for n, one in enumerate(examples)]
        trained = train_loras(base, jobs, loras, training).tensors()
        words = generate(base, [[3, 4, 5], [6, 7]], [0, 1], [PerPerson(loras)], max_new_tokens=4)
        return log_likelihood(base, examples, [PerPerson(loras)]), trained, words

    scores, trained, words = results()
    with without_kernels(family):
        assert kernels(family, torch.zeros(1)) is None
        assert all(kernels(other, torch.zeros(1)) is not None for other in FAMILIES if other != family)
        found = results()
    assert kernels(family, torch.zeros(1)) is not None
    torch.testing.assert_close(found[0], scores, rtol=0, atol=tolerance)
    torch.testing.assert_close(found[1], trained, rtol=0, atol=tolerance)
    assert found[2] == words


@needs_kernels
def test_the_environment_switches_off_single_families(monkeypatch, unloaded):
    monkeypatch.setenv("MTA_KERNELS", "off:rotate,adamw")
    off = [kernels(name, torch.zeros(1)) is None for name in ("norm", "rotate", "adamw")]
    assert off == [False, True, True]


@pytest.mark.parametrize("value", ["of", "off:rotat", "on:rotate", "off:rotate,"])
def test_words_that_mean_nothing_are_refused(monkeypatch, value):
    monkeypatch.setenv("MTA_KERNELS", value)
    with pytest.raises(ConfigError, match=f"MTA_KERNELS is '{value}'; expected off, or off:NAME,NAME") as caught:
        obstacle()
    assert caught.value.hint == "Use all kernels:  unset MTA_KERNELS"
