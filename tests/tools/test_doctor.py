"""What the doctor finds: on a machine as it is, and on one that lacks something."""

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from mta.system import assets
from mta.tools import doctor
from mta.tools.doctor import BASE, examine

GIB = 1 << 30


def found(name, findings):
    return next(one for one in findings if one.name == name)


@pytest.fixture
def no_network(monkeypatch):
    """Whoever opens a connection fails."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was opened"))


def test_an_empty_cache_is_a_warning_that_says_what_is_fetched_from_where(cache, no_network, without_kernels):
    findings = examine()
    missing = found("base, encoder, data", findings)
    assert missing.verdict == "warning"
    assert missing.found.startswith("fetched once by pip")
    assert "smollm2-135m-instruct (93 MB)" in missing.found
    assert str(cache) in found("folder", findings).found
    assert not any(path.is_file() for path in (cache / "assets").glob("**/*"))


@pytest.fixture
def without_kernels(monkeypatch):
    """What is looked at is not the compiler."""
    monkeypatch.setenv("MTA_KERNELS", "off")


@pytest.mark.skipif(bool(doctor.obstacle()), reason=f"no kernels here: {doctor.obstacle()}")
def test_kernels_that_work_are_compiled(monkeypatch):
    reported = doctor._kernels()
    assert (reported.verdict, reported.found, reported.hint) == ("ok", "yes, for this processor", "")
    monkeypatch.setenv("MTA_KERNELS", "off:rotate,adamw")
    reported = doctor._kernels()
    assert reported.found == "yes, for this processor; MTA_KERNELS switches off adamw, rotate"


@pytest.mark.integration
@pytest.mark.skipif(bool(doctor.obstacle()), reason=f"no kernels here: {doctor.obstacle()}")
def test_kernels_that_fail_to_compile_are_reported_with_the_compilers_first_error(cache, monkeypatch, tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho \"kernels.cpp:1:1: error: no 'requires' here\" >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.delenv("MTA_KERNELS", raising=False)
    done = mta_doctor("--json", PATH=f"{tmp_path}:{os.environ['PATH']}")
    kernels = found("compiled", [namedtuple("finding", one)(**one) for one in json.loads(done.stdout)["findings"]])
    assert (kernels.verdict, kernels.found) == ("warning", "failed: kernels.cpp:1:1: error: no 'requires' here")
    assert kernels.hint.endswith("Kernels need g++ 12 or newer, on Linux.")


def test_kernels_that_are_off_and_those_not_supported_are_distinguished(monkeypatch):
    monkeypatch.setenv("MTA_KERNELS", "off:rotate")
    monkeypatch.setattr("mta.kernels.compile.sys.platform", "linux")
    monkeypatch.setattr("mta.kernels.compile.platform.machine", lambda: "x86_64")
    monkeypatch.setattr("mta.kernels.compile.shutil.which", lambda _: None)
    reported = doctor._kernels()
    assert (reported.verdict, reported.found) == ("warning", "not supported here: there is no g++")
    monkeypatch.setenv("MTA_KERNELS", "off")
    reported = doctor._kernels()
    assert (reported.verdict, reported.found) == ("warning", "off: MTA_KERNELS is off")
    assert reported.hint.endswith("unset MTA_KERNELS")


def test_assets_that_are_there_need_no_network(cache, no_network, without_kernels):
    for name, asset in assets.ASSETS.items():
        folder = cache / "assets" / name
        for file in asset.files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
        marker = {"wheel_sha256": asset.wheel_sha256, "sizes": dict.fromkeys(asset.files, 0)}
        (folder / "asset.json").write_text(json.dumps(marker))
    there = found("base, encoder, data", examine())
    assert (there.verdict, there.found) == ("ok", "all there")


def test_a_cache_that_cannot_be_written_and_a_full_disk_are_problems(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "file" / "cache"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(GIB, GIB, 0))
    findings = list(doctor._assets())
    folder, disk = found("folder", findings), found("disk free", findings)
    assert (folder.verdict, folder.hint) == ("problem", "Set MTA_CACHE to a writable folder.")
    assert (disk.verdict, disk.hint[:19]) == ("problem", "A demo needs 3.2 GB")


@pytest.mark.parametrize(
    ("free", "verdict", "hint"),
    [
        (8 * GIB, "ok", ""),
        (4 * GIB, "warning", "Give memory=3GiB (mta demo and mta-lab evaluate: run.memory=3GiB)."),
        (BASE, "problem", "Free memory: a demo needs about 6 GiB, less with run.memory=1GiB."),
        (None, "warning", ""),
    ],
)
def test_memory_is_held_against_what_a_run_may_take(monkeypatch, free, verdict, hint):
    monkeypatch.setattr(doctor, "_free_memory", lambda: free)
    memory = doctor._memory()
    assert (memory.verdict, memory.hint) == (verdict, hint)
    assert "memory=4GiB bounds one cohort" in memory.found


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="needs /proc")
def test_files_that_the_kernel_caches_count_as_free_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_CGROUP", tmp_path)
    for name, text in (("max", "9000"), ("current", "8000"), ("stat", "anon 5000\nactive_file 10\ninactive_file 2500")):
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    assert doctor._free_memory() == 3500
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor._free_memory() > 1 << 20


@pytest.mark.parametrize(
    ("driver", "visible", "verdict"), [(True, "0", "warning"), (False, "0", "ok"), (True, "", "ok")]
)
def test_a_gpu_that_torch_does_not_use_is_a_warning(monkeypatch, driver, visible, verdict):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi" if driver else None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    device = found("device", doctor._machine())
    assert (device.verdict, "install torch for that driver" in device.hint) == (verdict, verdict == "warning")


def test_for_a_device_what_only_a_demo_needs_is_not_checked(cache, without_kernels):
    findings = examine(device="cpu")
    assert {one.about for one in findings} == {"versions", "machine", "kernels"}
    assert not [one for one in findings if one.verdict == "problem"]
    device = found("device", examine(device="toaster"))
    assert (device.verdict, device.found[:33]) == ("problem", "device 'toaster' cannot be used: ")


def test_a_device_that_computes_nothing_is_a_problem(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(doctor.torch, "ones", fails)
    device = found("device", doctor._machine("cpu"))
    assert (device.verdict, device.found.split(";")[0]) == ("problem", "cpu: CUDA error: out of memory")


def test_missing_extras_that_a_demo_needs_are_a_problem(cache, monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name in ("matplotlib", "gguf") else "1.0")
    needed, assets = doctor._extras()
    assert (needed.verdict, needed.found) == ("problem", "not installed: matplotlib")
    assert needed.hint == "A demo needs it: pip install matplotlib rouge-score"
    assert (assets.name, assets.verdict) == ("assets", "problem")
    monkeypatch.setattr(doctor, "is_present", lambda name: True)
    assert [one.name for one in doctor._extras()] == ["eval"]


def mta_doctor(*words, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mta", "doctor", *words], env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.integration
def test_the_command_ends_with_0_where_a_demo_could_run_and_with_1_and_the_problem_elsewhere(cache, tmp_path):
    (tmp_path / "file").write_text("")
    closed = str(tmp_path / "file" / "cache")
    done = mta_doctor(MTA_CACHE=closed, MTA_KERNELS="off", COLUMNS="200")
    assert (done.returncode, "Fix the problems first." in done.stdout) == (1, True)
    assert "Set MTA_CACHE to a writable folder." in done.stdout
    done = mta_doctor("--json", MTA_KERNELS="off")
    reported = json.loads(done.stdout)
    assert done.returncode == bool(reported["problems"]), done.stderr
    problems = [one["about"] for one in reported["findings"] if one["verdict"] == "problem"]
    assert set(problems) <= {"memory", "cache"}  # which a small machine may lack
    kernels = found("compiled", [namedtuple("finding", one)(**one) for one in reported["findings"]])
    assert (kernels.verdict, kernels.found) == ("warning", "off: MTA_KERNELS is off")
    assert {one["verdict"] for one in reported["findings"]} <= {"ok", "warning", "problem"}
