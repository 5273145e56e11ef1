"""The library leaves the malloc of a process alone; the command line and an explicit call change it."""

import subprocess
import sys
from pathlib import Path

import pytest

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
    from mta.system import malloc

    monkeypatch.setattr(malloc, "_keeps", False)  # an earlier test may have run the command line in this process
    monkeypatch.setattr(malloc, "Path", lambda _: pytest.fail("memory was looked at"))
    malloc.give_back_memory(keep=0)


def test_a_kernel_that_does_not_tell_the_memory_is_no_error(monkeypatch):
    from mta.system import malloc

    monkeypatch.setattr(malloc, "_keeps", True)
    monkeypatch.setattr(malloc.Path, "read_text", lambda *_, **__: "VmRSS: 1 kB\n")
    malloc.give_back_memory(keep=0)
