"""Choice of device and dtype; threads and random generators of the process keep their state."""

import threading
from types import SimpleNamespace

import pytest
import torch

from mta.errors import ModelError
from mta.system import device
from mta.system.device import compute_with, pick_device, pick_dtype


def threads_of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def _three_threads():
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("_three_threads")
def test_compute_with_changes_only_its_own_thread():
    own = []
    thread = threading.Thread(target=lambda: (compute_with(1), own.append(torch.get_num_threads())))
    thread.start()
    thread.join()
    assert own == [1]
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (3, 3)


@pytest.mark.parametrize("flags", ["avx512f avx512_bf16", "amx_bf16", "asimd bf16", "avx512f", ""])
def test_auto_is_bfloat16_where_the_processor_has_instructions_for_it(monkeypatch, flags):
    monkeypatch.setattr(device, "cpuinfo", lambda *fields: flags)
    assert pick_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if "bf16" in flags else torch.float32)


def test_a_named_gpu_becomes_the_current_one(monkeypatch):
    current, gpu = [], torch.device("cuda", 1)
    monkeypatch.setattr(device.torch, "zeros", lambda *_, **how: SimpleNamespace(device=torch.device(how["device"])))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("cuda:1") == gpu
    pick_device("cpu")
    assert current == [gpu]


def test_a_missing_device_is_reported():
    with pytest.raises(ModelError, match="device 'toaster' cannot be used") as caught:
        pick_device("toaster")
    assert caught.value.hint.startswith("Use --device cpu, or install torch for your GPU: https://pytorch.org/")


def test_an_unknown_dtype_is_named_with_the_known_ones():
    with pytest.raises(ModelError, match=r"'float8'.*expected auto, float32, bfloat16, float64"):
        pick_dtype("float8", torch.device("cpu"))
