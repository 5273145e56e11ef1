"""The number of cores, in containers with and without a CPU quota."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mta.system import cores as module
from mta.system.cores import cores, limit_threads


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cgroup of a process whose affinity is 64 cores."""
    monkeypatch.setattr(module, "_CGROUP", tmp_path)
    monkeypatch.setattr(module, "_affinity", lambda: 64)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "9900000 100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_the_quota_limits_the_cores(cgroup: Path, files: dict[str, str], count: int) -> None:
    (cgroup / "cpu").mkdir()
    for name, text in files.items():
        (cgroup / name).write_text(text)
    assert cores() == count


def test_threads_are_limited_to_the_quota_unless_the_user_set_them(
    cgroup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})
    limit_threads()
    assert os.environ == {}
    (cgroup / "cpu.max").write_text("400000 100000\n")
    limit_threads()
    assert os.environ == {"OMP_NUM_THREADS": "4"}
    os.environ["OMP_NUM_THREADS"] = "7"
    limit_threads()
    assert os.environ == {"OMP_NUM_THREADS": "7"}


def test_torch_computes_with_the_threads_of_a_limit_that_is_set_before_its_import(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    code = (
        "from pathlib import Path; from mta.system import cores; cores._affinity = lambda: 2; "
        f"cores._CGROUP = Path({str(tmp_path)!r}); import mta.cli.app; cores.limit_threads(); "
        "import torch; print(torch.get_num_threads())"
    )
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
