"""The cores of a process, in containers with and without a CPU quota, and its malloc.

The library leaves the malloc of a process alone; the command line and an explicit call change it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mta.system import process
from mta.system.process import OtherProcesses, cores, limit_threads

TESTS = Path(__file__).parents[1]
LIBRARY = """
import mta
from tiny import base_of, random_examples
from mta.config import Training
from mta.lora.batch import fresh
from mta.training.trainer import Job, train_loras

saved = base_of()
saved.model.save_pretrained(FOLDER)
saved.tokenizer.save_pretrained(FOLDER)
base = mta.BaseModel.load(FOLDER, dtype="float32", device="cpu")
jobs = [Job("a", random_examples(2, seed=0))]
train_loras(base, jobs, fresh(base.targets, 1, 1.0, 0, ["a"]), Training(steps=2))
"""
ASKED = "import mta\nmta.keep_freed_memory()\n"
COMMAND = """
import sys
from mta.cli import main

sys.argv = ["mta", "--version"]
try:
    main()
except SystemExit:
    pass
"""
# glibc maps a block of 256 MiB by itself and unmaps it when it is freed, unless malloc was set to keep freed memory.
OBSERVED = """
import ctypes
import os
from pathlib import Path


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


libc, size = ctypes.CDLL(None), 256 << 20
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
block = libc.malloc(size)
ctypes.memset(block, 1, size)
full = resident()
libc.free(block)
print("returned" if full - resident() > size // 2 else "kept")
"""


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cgroup of a process whose affinity is 64 cores."""
    monkeypatch.setattr(process, "_CGROUP", tmp_path)
    monkeypatch.setattr(process, "_affinity", lambda: 64)
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


@pytest.mark.integration
def test_torch_computes_with_the_threads_of_a_limit_that_is_set_before_its_import(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    code = (
        "from pathlib import Path; from mta.system import process; process._affinity = lambda: 2; "
        f"process._CGROUP = Path({str(tmp_path)!r}); import mta.cli.app; process.limit_threads(); "
        "import torch; print(torch.get_num_threads())"
    )
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="observes glibc's malloc through /proc")
@pytest.mark.parametrize(
    ("program", "freed"),
    [pytest.param(LIBRARY, "returned", marks=pytest.mark.integration), (ASKED, "kept"), (COMMAND, "kept")],
)
def test_only_the_command_line_or_an_explicit_call_makes_a_process_keep_freed_memory(program, freed, tmp_path):
    code = f"FOLDER = {str(tmp_path)!r}\n{program}\n{OBSERVED}"
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == freed


def test_memory_is_not_given_back_in_a_process_that_does_not_keep_it(monkeypatch):
    monkeypatch.setattr(process, "_keeps", False)  # an earlier test may have run the command line in this process
    monkeypatch.setattr(process, "Path", lambda _: pytest.fail("memory was looked at"))
    process.give_back_memory(keep=0)


@pytest.mark.parametrize(("busy", "own", "used"), [(19.0, 1.0, 1.8), (10.0, 10.0, 0.0), (9.0, 10.0, 0.0)])
def test_cores_of_other_processes(monkeypatch, busy, own, used):
    counts = iter([(100.0, 5.0, 2.0), (110.0, 5.0 + busy, 2.0 + own), (110.5, 99.0, 2.0)])
    monkeypatch.setattr(OtherProcesses, "_seconds", lambda *_: next(counts))
    monkeypatch.setattr(process, "cores", process._affinity)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    others = OtherProcesses()
    assert others.cores() == pytest.approx(used)
    assert others.cores() == 0  # within less than a second
