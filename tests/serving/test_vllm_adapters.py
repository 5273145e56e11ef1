"""One adapter of bounded rank from task LoRA, merge, and stack: optimal, with a correct error."""

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import base_of, random_loras

from mta.errors import ConfigError, InputError, OtherBank, StateCorrupt
from mta.lora.batch import Factors, LoraBatch, join
from mta.lora.merge import truncate
from mta.lora.peft import read_peft, write_peft
from mta.personalize.adapters import BASE, TASK
from mta.personalize.forgetting import forget_person
from mta.personalize.merge import Merge, merge_loras
from mta.serving.engine import Version, from_wire, named, wire_name
from mta.serving.launch import vllm_settings
from mta.serving.vllm.adapters import AdapterFolders, LoraExporter, folder_of, remove_all
from mta.store import Store
from mta.store.state import State

BASE_MODEL = base_of(dtype=torch.float32)
ANCHORS = random_loras(BASE_MODEL, 5, rank=2, seed=1, scale=0.7)
POOLED = random_loras(BASE_MODEL, 1, rank=2, seed=2, scale=1.5)


def state_of(stacked=True, w=(0.4, -1.0, 2.0), bank="bank"):
    stack = random_loras(BASE_MODEL, 1, rank=1, seed=3, scale=4.0) if stacked else None
    return State(bank, (4, 0, 2), w, "fixed", "", "work", 0, stack)


def merge_of(state):
    """Task LoRA and merge without truncation."""
    merge = Merge(torch.tensor([state.anchors]), torch.tensor([state.w]))
    return join([POOLED, merge_loras(ANCHORS, merge)])


def differ(one, other):
    """Relative Frobenius difference over all layers."""
    pairs = [(one.delta(name), other.delta(name)) for name in one.names]
    lost = sum((a - b).square().sum() for a, b in pairs)
    return float((lost / sum(b.square().sum() for _, b in pairs)).sqrt())


def test_a_persons_files_are_deleted_finished_or_not(tmp_path):
    names = [folder_of(wire_name(Version(id, 1, seal="a" * 16))) for id in ("ann", "anna")]
    made = [tmp_path / f"{dot}{name}" for name in names for dot in ("", ".")]
    for folder in made:
        folder.mkdir()
    remove_all(tmp_path, "ann")
    assert [folder.exists() for folder in made] == [False, False, True, True]


@pytest.mark.parametrize("stacked", [True, False])
def test_an_adapter_that_fits_its_slot_is_exact(stacked):
    state = state_of()
    found = LoraExporter(ANCHORS, POOLED, "bank", 16).adapter(state, stacked)
    whole = merge_of(state)
    assert found.rank <= 16
    assert differ(found, join([whole, state.stack]) if stacked else whole) < 1e-5


@pytest.mark.parametrize("slot", [2, 4, 8])
def test_truncation_is_optimal(slot):
    state = state_of()
    found = LoraExporter(ANCHORS, POOLED, "bank", slot).adapter(state)
    merge = merge_of(state)
    best, _ = truncate(merge, slot - 1)
    assert found.rank == min(slot, merge.rank + 1)
    assert differ(found, join([best, state.stack])) < 1e-4


def test_the_randomized_svd_for_many_anchors_is_as_accurate():
    """For wide layers an svd of a few directions finds the optimum too, reproducibly."""
    draw = torch.Generator().manual_seed(0)
    start = Factors(torch.randn(1, 2, 64, generator=draw), torch.randn(1, 96, 2, generator=draw))
    near = Factors(*(part + 0.1 * torch.randn(40, *part.shape[1:], generator=draw) for part in start))
    anchors, w = LoraBatch({"layer": near}), tuple(torch.linspace(-1, 1.5, 40).tolist())
    state = State("bank", tuple(range(40)), w, "fixed", "", "work", 0)
    made = LoraExporter(anchors, None, "bank", 2)
    found, again = made.adapter(state), made.adapter(state)
    whole = merge_loras(anchors, Merge(torch.tensor([state.anchors]), torch.tensor([w])))
    best, least = truncate(whole, 2)
    assert differ(found, whole) == pytest.approx(float(least), rel=1e-4)
    assert differ(found, best) < 1e-2
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in found.tensors().items())


def test_layers_with_fewer_outputs_than_the_slot_have_its_rank_too(tmp_path):
    """As the gate of a shared expert, which has one output."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"gate": 1, "layer": 24}
    factors = {
        name: Factors(torch.randn(3, 2, 16, generator=draw), torch.randn(3, out, 2, generator=draw))
        for name, out in sizes.items()
    }
    state = State("bank", (0, 1, 2), (0.5, -1.0, 2.0), "fixed", "", "work", 0)
    found = LoraExporter(LoraBatch(factors), None, "bank", 8).adapter(state)
    write_peft(tmp_path / "ann", found, "base")
    assert read_peft(tmp_path / "ann").rank == 6
    merge = merge_loras(LoraBatch(factors), Merge(torch.tensor([state.anchors]), torch.tensor([state.w])))
    assert differ(found, merge) < 1e-5


def test_the_pooled_model_is_the_task_lora_and_the_adapter_of_the_base_is_zero():
    made = LoraExporter(ANCHORS, POOLED, "bank", 8)
    assert differ(made.adapter(TASK), POOLED) < 1e-6
    zero = made.adapter(BASE)
    assert zero.names == POOLED.names
    assert not any(zero.delta(name).any() for name in zero.names)
    with pytest.raises(InputError):
        LoraExporter(ANCHORS, None, "bank", 8).adapter(TASK)


def test_unbuildable_adapters_are_refused():
    with pytest.raises(OtherBank):
        LoraExporter(ANCHORS, POOLED, "another", 8).adapter(state_of())
    with pytest.raises(InputError, match="no room"):
        LoraExporter(ANCHORS, POOLED, "bank", 1).adapter(state_of())
    broken = state_of()
    next(iter(broken.stack.factors.values())).a[0, 0, 0] = torch.nan
    with pytest.raises(StateCorrupt):
        LoraExporter(ANCHORS, POOLED, "bank", 8).adapter(broken)


@given(st.text(min_size=1), st.integers(1, 10**8), st.booleans(), st.text("0123456789abcdef", min_size=64, max_size=64))
def test_a_wire_name_identifies_one_version_and_differs_from_the_model_name(person, number, stacked, seal):
    try:
        person.encode()
    except UnicodeEncodeError:
        return
    who = Version(person, number, stacked, seal)
    name = wire_name(who)
    assert from_wire(name) == Version(person, number, stacked, seal[:16])
    assert "/" not in name
    assert named(name, "base") != named(name.rpartition("~")[0], "base")


def test_wire_names_without_version_and_seal_are_unknown():
    assert from_wire("task") is TASK
    assert from_wire("base") is BASE
    for name in ("person:ann", "person:ann@v1", "person:ann~0123456789abcdef", "ann", "", "task~0123456789abcdef"):
        assert from_wire(name) is None


@pytest.fixture
def adapters(tiny, tmp_path):
    """AdapterFolders as in a vLLM server, over the tiny bank and a store with one person."""
    base, bank = tiny
    store = Store(tmp_path / "people")
    stack = random_loras(base, 1, rank=1, seed=3)
    store.save("../ann", State(bank.hash, (0, 2), (0.5, 0.25), "fixed", "", "work", 0, stack))
    (tmp_path / "adapters").mkdir()
    return AdapterFolders(bank.folder, str(tmp_path / "people"), tmp_path / "adapters", 16), store


@pytest.mark.parametrize(
    ("args", "rank"), [("", 16), ("--max-lora-rank 8", 8), ("--enforce-eager --max_lora_rank=32", 32)]
)
def test_adapters_are_truncated_to_vllms_rank(args, rank, tmp_path, monkeypatch):
    monkeypatch.setattr(BASE_MODEL, "name", str(tmp_path))
    settings = vllm_settings("python", BASE_MODEL, tmp_path, "people", slots=4, args=args)
    assert settings.environment(tmp_path)["MTA_VLLM_RANK"] == str(rank)
    assert f"--max-lora-rank={rank}" in settings.command(tmp_path / "socket")


@pytest.mark.parametrize("args", ["--max-lora-rank many", "--max-lora-rank", "'--max-lora-rank 8"])
def test_unparsable_vllm_arguments_are_refused(args, tmp_path, monkeypatch):
    monkeypatch.setattr(BASE_MODEL, "name", str(tmp_path))
    with pytest.raises(ConfigError, match="--vllm-args"):
        vllm_settings("python", BASE_MODEL, tmp_path, "people", slots=4, args=args)


def name_of(store, person, **how):
    return wire_name(Version(person, 1, seal=store.seal(person, 1) or "0" * 64, **how))


def test_an_adapter_is_built_once_in_its_folder(adapters):
    made, store = adapters
    name = name_of(store, "../ann")
    path = made.path(name)
    assert path == made.folder / folder_of(name)
    assert read_peft(path).rank == 9
    before = path.stat().st_mtime_ns
    assert made.path(name) == path
    assert path.stat().st_mtime_ns == before
    assert read_peft(made.path(name_of(store, "../ann", stacked=False))).rank == 8
    assert read_peft(made.path("task")).rank == 2


def test_unknown_or_corrupt_people_get_no_adapter(adapters, caplog):
    made, store = adapters
    for name in ("base", "person:ann@v1", name_of(store, "bob"), name_of(store, "../ann").replace("@v1", "@v2")):
        assert made.path(name) is None
    assert list(made.folder.iterdir()) == []
    path = next((made.folder.parent / "people").rglob("1.safetensors"))
    name = name_of(store, "../ann")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with caplog.at_level(logging.WARNING):
        assert made.path(name) is None
    assert "StateCorrupt" in caplog.text
    assert "ann" not in caplog.text.replace("anchors", "")
    assert not (made.folder / folder_of(name)).exists()


def test_the_log_of_vllm_says_why_a_stack_does_not_fit(adapters, caplog):
    made, store = adapters
    store.save("../bob", replace(store.load("../ann"), stack=random_loras(BASE_MODEL, 1, rank=made.rank)))
    with caplog.at_level(logging.WARNING):
        assert made.path(name_of(store, "../bob")) is None
    assert f"a stack of rank {made.rank} leaves no room" in caplog.text
    assert "--max-lora-rank 32" in caplog.text
    assert "bob" not in caplog.text


def test_a_person_forgotten_during_the_build_gets_no_adapter(adapters, monkeypatch):
    made, store = adapters
    name = name_of(store, "../ann")
    plain = LoraExporter.adapter

    def forgotten_meanwhile(self, *how):
        forget_person("../ann", store)
        return plain(self, *how)

    monkeypatch.setattr(LoraExporter, "adapter", forgotten_meanwhile)
    assert made.path(name) is None
    assert list(made.folder.iterdir()) == []
