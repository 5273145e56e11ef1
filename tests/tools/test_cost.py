"""A fleet's size on paper against what is really kept and computed."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import base_of
from transformers import Gemma3Config, Gemma3TextConfig
from typer.testing import CliRunner

from mta.bank.calibration.calibrate import rivals_of
from mta.bank.calibration.crossfit import Calibrator
from mta.bank.calibration.people import Subject
from mta.cli.app import app
from mta.config import Run, override
from mta.data.tasks.prompt import Example
from mta.errors import ConfigError
from mta.lora.batch import Factors, LoraBatch
from mta.lora.peft import write_peft
from mta.model.footprint import Footprint, LayerTotals, ParameterCounts, TextLengths
from mta.store.state import Losses, State
from mta.tools.cost import DataSizes, Shape, _scored, costs, hardware, memory, what_fits

SMOL = "smollm2-135m-instruct"
FOOTPRINT = Footprint(LayerTotals(), 1, 1, 1, 1, 2)


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = Gemma3TextConfig(vocab_size=300, head_dim=16, num_key_value_heads=1, **SIZES)
WITH_IMAGES = Gemma3Config(
    text_config=TEXT.to_dict(), vision_config=SIZES | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
)


def off(found, expected):
    return abs(found / expected - 1)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt2"])
def test_a_shape_is_read_from_a_config_alone(kind, tmp_path):
    base = base_of(kind)
    base.model.config.save_pretrained(tmp_path)
    shape = Shape.of(str(tmp_path))
    assert shape.parameters == sum(p.numel() for p in base.model.parameters())
    assert (shape.linear, shape.width) == (
        sum(d * o for d, o in base.targets.values()),
        sum(d + o for d, o in base.targets.values()),
    )
    head = base.model.get_output_embeddings()
    assert shape.head == head.weight.numel()


def test_the_well_known_shapes_are_what_their_makers_say():
    said = {"llama-3-8b": 8.03e9, "llama-2-7b": 6.74e9, "llama-3-70b": 70.6e9, "qwen2.5-7b": 7.6e9, SMOL: 134.5e6}
    for name, parameters in said.items():
        assert off(Shape.of(name).parameters, parameters) < 0.01, name


def test_what_is_kept_of_a_person_is_what_their_files_take(tmp_path):
    shape = Shape.of(SMOL)
    # The layers' names and sizes of the real model; what is in them does not count.
    sizes = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576)}
    sizes |= {"gate": (576, 1536), "up": (576, 1536), "down": (1536, 576)}
    names = {f"model.layers.{n}.{name}_proj": size for n in range(30) for name, size in sizes.items()}
    assert shape.width == sum(d + o for d, o in names.values())

    def adapter(rank):
        return LoraBatch({n: Factors(torch.ones(1, rank, d), torch.ones(1, o, rank)) for n, (d, o) in names.items()})

    run = override(Run(), ["bank.anchors=32"])
    predicted = costs(shape, run, DataSizes())
    for stack, name in ((adapter(1), "MTA"), (None, "merge alone")):
        merge = tuple(range(32)), (0.123456789012345678,) * 32
        losses = Losses(*[0.123456789012345678] * 3, tokens=16)
        read = {"gradient": merge[1], "loglik": -0.123456789012345678, "shots": 8}
        kept = State("b" * 64, *merge, "laplace", "h" * 64, "w" * 64, 0, stack, losses=losses, **read)
        assert off(predicted[name].person_bytes, len(kept.to_bytes())) < 0.15, name
    write_peft(tmp_path / "oppu", adapter(8), SMOL)
    assert off(predicted["OPPU"].person_bytes, sum(f.stat().st_size for f in (tmp_path / "oppu").iterdir())) < 0.15


def test_the_memory_of_a_bank_and_a_row_is_as_predicted(tiny_bank_folder, tiny, tmp_path):
    from mta.serving.embedded.adapter_slots import AdapterSlots
    from mta.serving.embedded.kv_cache import Slots

    base, bank = tiny
    base.model.config.save_pretrained(tmp_path)
    shape = Shape.of(str(tmp_path))
    predicted = costs(shape, bank.info.run, DataSizes())
    files = [tiny_bank_folder / "anchors.safetensors", *(tiny_bank_folder / "task_lora").glob("*.safetensors")]
    tensors = sum(f.stat().st_size - 8 - int.from_bytes(f.read_bytes()[:8], "little") for f in files)
    assert predicted["MTA"].fixed_bytes * torch.finfo(base.master_dtype).bits / 32 == tensors
    adapters = AdapterSlots(base, bank, 3)
    slots = Slots(base, 3, 40, 8, adapters)
    for n in range(3):
        slots.take((n, ""), [5, 6])
    with torch.inference_mode(), adapters.opened(slice(0, 3)):
        slots.logits(slice(0, 3), [[5, 6]] * 3)
    own_adapter = sum(part[0].numel() for own in adapters._own.values() for part in own)
    kept = sum(part[0].numel() for pair in slots.cache.kept for part in pair)
    row = kept + own_adapter + adapters._ranks
    predicted = memory(shape, bank.info.run, DataSizes(context=48))
    assert predicted.row == 2 * row
    shared = sum(part[: adapters._ranks].numel() for a, b in adapters._shared.values() for part in (a, b.mT))
    working = sum(
        factor.numel()
        for batch in (bank.device_anchors, bank.task_lora)
        for pair in batch.factors.values()
        for factor in pair
    )
    assert predicted.bank == 2 * (shared + working)


def test_layers_that_no_pass_of_a_text_calls_have_no_adapters(tmp_path):
    """As the encoder of images in Gemma 3."""
    for name, config in (("text", TEXT), ("both", WITH_IMAGES)):
        config.save_pretrained(tmp_path / name)
    text, vision = (Shape.of(str(tmp_path / name)) for name in ("text", "both"))
    assert (vision.layers, vision.width, vision.linear) == (text.layers, text.width, text.linear)
    assert vision.footprint.sums == text.footprint.sums
    assert vision.parameters > text.parameters


def test_training_takes_what_the_plan_of_a_loaded_base_counts(tmp_path):
    base, run = base_of(dtype=torch.bfloat16), override(Run(), ["bank.lora.rank=4", "task_lora.lora.rank=3"])
    base.model.config.save_pretrained(tmp_path)
    shape = Shape.of(str(tmp_path))
    planned = Footprint.of(base.model, 2, base.targets)
    predicted, numbers = (
        memory(shape, run, DataSizes(tokens=90, shared=40)),
        ParameterCounts(4 * shape.width, task_lora=3 * shape.width),
    )
    assert predicted.anchor == 6 * 4 * numbers.trained + planned.person(numbers)
    assert predicted.token == planned.token(TextLengths(90, 40), 4)  # a stack of rank 1 and the task LoRA
    assert predicted.target == planned.target


@given(st.integers(1, 4), st.integers(1, 64), st.integers(1, 500))
def test_costs_grow_with_what_they_are_of(rank, anchors, tokens):
    shape = Shape("x", 10**8, 10**8, 10**5, 100, 10**7, 1000, FOOTPRINT)

    def of(*words, load=None):
        run = override(Run(), [f"bank.anchors={anchors}", f"bank.lora.rank={rank}", *words])
        return costs(shape, run, load or DataSizes(tokens=tokens + 16))

    first, more = of(), of(f"bank.anchors={anchors + 1}")
    assert more["MTA"].fixed_bytes > first["MTA"].fixed_bytes
    assert more["MTA"].person_operations > first["MTA"].person_operations
    assert more["OPPU"] == first["OPPU"]
    longer = of(load=DataSizes(tokens=2 * (tokens + 16), targets=32))
    assert longer["MTA"].person_operations == pytest.approx(2 * first["MTA"].person_operations)
    alone = of("stack.enabled=false")
    assert alone["MTA"] == alone["merge alone"]


def test_the_command_prints_tables_and_json(tmp_path):
    run = CliRunner().invoke
    found = json.loads(run(app, ["size", "--on", "h100", "--people", "1e6", "--json", "bank.anchors=50"]).stdout)
    assert found["people"] == 1e6
    assert found["MTA"]["fixed_bytes"] > 4e9
    assert found["hardware"]["name"] == "h100"
    assert found["OPPU, seconds"]["all"] > found["MTA, seconds"]["all"] > 0
    said = run(app, ["size", "--base", SMOL, "--on", "l4"]).stdout
    assert "OPPU" in said
    assert "the manufacturer's" in said
    with pytest.raises(ConfigError, match="no such hardware"):
        hardware("abacus")
    with pytest.raises(ConfigError, match="cannot read the shapes of"):
        Shape.of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "num_hidden_layers": 1, "hidden_size": 8}')
    with pytest.raises(ConfigError, match="not a model with attention layers only"):
        Shape.of(str(tmp_path))
    for tokens, targets, shared in ((16, 16, 100), (4, 16, 0), (16, 0, 0)):
        with pytest.raises(ConfigError, match="targets"):
            DataSizes(tokens, targets, shared=shared)
    with pytest.raises(ConfigError, match="4 anchors"):
        costs(Shape("x", 1, 1, 1, 1, 1, 1, FOOTPRINT), override(Run(), ["bank.anchors=4", "merge.k=9"]), DataSizes())


def test_settings_change_what_is_counted():
    shape, data = Shape.of("smollm2-135m-instruct"), DataSizes()
    plain, less = (memory(shape, override(Run(), words), data) for words in ([], ["gradient_checkpointing=true"]))
    assert less.token < plain.token / 2
    words = ["stack.training.steps=1"]  # else a bank without a calibration trains other steps
    calibrated, without = (
        costs(shape, override(Run(), [*words, f"calibration.enabled={on}"]), data)["MTA"].fixed_operations
        for on in ("true", "false")
    )
    how, example = Run().calibration, Example((1, 2), 1)
    subjects = [Subject((example,) * how.shots, (example,) * how.queries) for _ in range(how.people)]
    known = {"settings": how, "measure": lambda _: iter(()), "rivals": rivals_of(Run())}
    passes = Calibrator(subjects, anchors=50, **known).planned_cost
    assert calibrated - without == pytest.approx(_scored(shape, data, passes, 8 + 50 * 8))


def test_the_command_sizes_the_base_of_its_settings(tmp_path):
    (tmp_path / "c.yaml").write_text("base: llama-2-7b")
    words = ["--config", str(tmp_path / "c.yaml")]
    for more, name in (([], "llama-2-7b"), (["--base", "llama-3-8b"], "llama-3-8b")):
        found = CliRunner().invoke(app, ["size", "--on", "h100", "--json", *words, *more])
        assert json.loads(found.stdout)["base"]["name"] == name


def test_groups_cost_what_their_items_do_and_the_gradients_that_form_them():
    shape = Shape.of(SMOL)
    active, groups, twice = (
        costs(shape, override(Run(), [f"bank.choose={how}", *words]), DataSizes())["MTA"]
        for how, *words in (("active",), ("groups",), ("groups", "bank.rounds=2"))
    )
    assert active.fixed_operations < groups.fixed_operations < twice.fixed_operations
    assert active.person_bytes == groups.person_bytes


def test_what_fits_a_card_depends_on_the_quantization():
    shape, data, card = Shape.of("llama-3-8b"), DataSizes(), hardware("rtx-4090")
    said = {}
    for kind in ("none", "nf4"):
        run = override(Run(), [f"quantize={kind}", "bank.anchors=16", "gradient_checkpointing=true"])
        found = memory(shape, run, data)
        said[kind] = found.base, what_fits(card, found)
    assert said["nf4"][0] == pytest.approx(5.7e9, rel=0.01)
    assert said["none"][0] == pytest.approx(16.06e9, rel=0.01)
    assert said["nf4"][1].startswith("Fits 90% of 24 GB on rtx-4090: base and bank leave 14 GB")
    run = override(Run(), ["bank.anchors=50", "bank.lora.rank=16"])
    assert what_fits(card, memory(shape, run, data)).startswith("Does not fit: base and bank need 2")
