"""What a training pass copies to a GPU. The ``meta`` device takes its place: reading a value there is an error."""

from types import SimpleNamespace

import pytest
import torch
from tiny import base_of, random_examples, random_loras
from torch.utils._python_dispatch import TorchDispatchMode

from mta.config import Training
from mta.lora.layers import Gated, PerPerson, Renumbered, Shared
from mta.model.tree_attention import additive, blocks_of, tree_attention
from mta.system.device import moved
from mta.training.optimizer import BatchedAdamW
from mta.training.packing import collate, tree

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Counts the copies to another device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        source = {torch.ops.aten._to_copy: 0, torch.ops.aten.copy_: 1}.get(function.overloadpacket)
        self.count += source is not None and args[source].device != found.device
        return found


def test_tensors_are_moved_by_one_copy():
    parts = torch.zeros(2, 3, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(4, dtype=torch.long)
    with Copies() as copies:
        assert [one.shape for one in moved(META, *parts)] == [(2, 3), (0,), (4,)]
        assert copies.count == 1
        assert all(one is other for one, other in zip(moved(torch.device("cpu"), *parts), parts))
    assert copies.count == 1


def test_copies_to_a_gpu_come_from_pinned_memory_and_do_not_block(monkeypatch):
    done = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: done.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: done.append(non_blocking) or tensor)
    parts = torch.arange(3), torch.arange(4).view(2, 2)
    found = moved(SimpleNamespace(type="cuda"), *parts)
    assert done == ["pinned", True]
    assert all(torch.equal(one, other) for one, other in zip(found, parts))


def test_a_pass_copies_its_rows_once_and_its_blocks_once():
    trees = [tree(random_examples(count, count), range(count)) for count in (3, 1, 2)]
    with Copies() as copies:
        batch = collate(trees, 0, META, [5, 4, 7])
        assert copies.count == 1
        blocks = blocks_of(batch.ends, batch.positions, META)
        assert copies.count == 2
        q = torch.zeros(*batch.tokens.shape, 2, 4, device=META).transpose(1, 2)
        found, _ = tree_attention(None, q, q, q, additive(blocks.seen, q.dtype), blocks=blocks)
        batch.log_probs(torch.zeros(len(batch.places), 9, device=META))
    assert copies.count == 2
    assert found.device == META


@pytest.mark.parametrize(("owner", "copies"), [([0, 0, 1, 1], 1), ([0, 1, 1, -1], 2)], ids=["in order", "mixed"])
def test_adapters_find_their_rows_without_reading_from_the_device(owner, copies):
    batch, owner = random_loras(base_of(), 2).to(META), torch.tensor(owner)
    gates = Gated(batch, torch.zeros(2, 2, device=META))
    with Copies() as copied:
        for adapters in (Shared(batch.select(slice(1))), gates, PerPerson(batch)):
            for make in Renumbered(adapters, torch.tensor([0, 1])).terms(owner).values():
                make(torch.float64)
    assert copied.count == copies


def test_an_optimizer_step_copies_once():
    optimizer = BatchedAdamW.of(torch.zeros(3, 5, device=META))
    with Copies() as copies:
        optimizer.update(torch.ones(3, dtype=torch.float64), Training())
        assert copies.count == 1
        optimizer.keep(torch.tensor([0, 2]))
        assert optimizer.values.shape == (2, 5)
    assert copies.count == 2


def test_some_adapters_are_chosen_with_one_copy():
    batch = random_loras(base_of(), 3).to(META)
    with Copies() as copies:
        assert len(batch.select([2, 0])) == 2
    assert copies.count == 1
