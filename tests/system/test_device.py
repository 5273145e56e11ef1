"""What mta changes in the process it runs in, and what it leaves as it was."""

import threading

import pytest
import torch
from conftest import personalizer

from mta.serving.api.jobs import Jobs
from mta.serving.embedded.engine import EmbeddedEngine
from mta.store import Store
from mta.system.device import compute_with, seeded


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
def test_a_thread_that_computes_with_fewer_threads_leaves_those_that_begin_later_alone():
    own = []
    thread = threading.Thread(target=lambda: (compute_with(1), own.append(torch.get_num_threads())))
    thread.start()
    thread.join()
    assert own == [1]
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (3, 3)


@pytest.mark.usefixtures("_three_threads")
def test_a_server_leaves_the_number_of_threads_of_others_as_it_was(tiny, tmp_path):
    import asyncio

    base, bank = tiny
    store = Store(tmp_path / "people")

    async def go():
        engine = EmbeddedEngine(base, bank, store, slots=2, length=64)
        jobs = Jobs(personalizer(base.twin(), bank, store))
        await asyncio.get_running_loop().run_in_executor(engine._reading, lambda: None)
        await jobs.close()
        await engine.close()

    asyncio.run(go())
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (3, 3)


def test_what_is_drawn_with_a_seed_leaves_the_global_generator_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(9, torch.device("cpu")):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(9)
    assert torch.equal(first, torch.rand(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_what_is_drawn_with_a_seed_leaves_a_gpus_generator_as_it_was():
    torch.cuda.manual_seed(5)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(5)
    for device in ("cpu", "cuda"):
        with seeded(9, torch.device(device)):
            torch.rand(3, device=device)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
