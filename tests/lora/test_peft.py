import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import base_of, random_loras

from mta.errors import InputError
from mta.lora.batch import LoraBatch
from mta.lora.layers import Shared, applied
from mta.lora.peft import CONFIG, WEIGHTS, alpha_of, read_peft, write_peft

KINDS = ["llama", "qwen3", "gpt2"]
TOKENS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(1))
OWNER = torch.zeros(2, dtype=torch.long)


def ours(kind: str, adapter: LoraBatch) -> torch.Tensor:
    model = base_of(kind).model
    with torch.no_grad(), applied(model, [Shared(adapter)], OWNER):
        return model(TOKENS).logits


def with_peft(kind: str, folder: Path) -> tuple[torch.Tensor, peft.PeftModel]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing or unexpected keys, fan_in_fan_out put right, ...
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.PeftModel.from_pretrained(base_of(kind).model, folder)
    with torch.no_grad():
        return model(TOKENS).logits, model


def adapter_of(kind: str, **how: object) -> LoraBatch:
    return random_loras(base_of(kind), 1, **how)


def same(left: LoraBatch, right: LoraBatch) -> bool:
    return (
        left.scale == right.scale
        and set(left.names) == set(right.names)
        and all(torch.equal(x, y) for name in left.names for x, y in zip(left.factors[name], right.factors[name]))
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [2.0, 0.3])
def test_peft_computes_the_same_for_a_written_adapter(tmp_path: Path, kind: str, scale: float) -> None:
    adapter = adapter_of(kind, scale=scale)
    write_peft(tmp_path / "out", adapter, f"tiny-{kind}", fan_in_fan_out=kind == "gpt2")
    theirs, model = with_peft(kind, tmp_path / "out")
    assert (theirs - ours(kind, adapter)).abs().max() < 1e-9
    assert (theirs - base_of(kind).model(TOKENS).logits).abs().max() > 1e-3
    merged = model.merge_and_unload()
    assert (merged(TOKENS).logits - theirs).abs().max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_peft_adapts_exactly_these_layers(tmp_path: Path, kind: str) -> None:
    whole = adapter_of(kind)
    part = LoraBatch(dict(list(whole.factors.items())[1::3]), whole.scale)
    write_peft(tmp_path, part, "base", fan_in_fan_out=kind == "gpt2")
    theirs, model = with_peft(kind, tmp_path)
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert adapted == [f"base_model.model.{name}" for name in part.names]
    assert (theirs - ours(kind, part)).abs().max() < 1e-9


def test_a_written_folder_has_only_the_files_of_peft(tmp_path: Path) -> None:
    adapter = adapter_of("llama", rank=4, scale=2.0)
    write_peft(tmp_path / "a" / "out", adapter, "tiny-llama")
    assert sorted(path.name for path in (tmp_path / "a").rglob("*")) == [CONFIG, WEIGHTS, "out"]
    config = json.loads((tmp_path / "a" / "out" / CONFIG).read_text())
    expected = {"r": 4, "lora_alpha": 8, "bias": "none", "inference_mode": True, "task_type": "CAUSAL_LM"}
    assert expected.items() <= config.items()
    assert config["base_model_name_or_path"] == "tiny-llama"
    assert config["target_modules"] == adapter.names
    assert type(config["lora_alpha"]) is int
    name = adapter.names[0]
    tensors = load_file(tmp_path / "a" / "out" / WEIGHTS)
    assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], adapter.factors[name].a[0])
    assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], adapter.factors[name].b[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_written_adapter_is_read_back(tmp_path: Path, dtype: torch.dtype, rank: int) -> None:
    adapter = adapter_of("llama", rank=rank, scale=1.4 / rank).to(dtype)
    write_peft(tmp_path, adapter, "base")
    assert same(read_peft(tmp_path), adapter)
    assert len(read_peft(str(tmp_path))) == 1


@given(st.floats(1e-6, 1e6), st.integers(1, 512))
def test_alpha_encodes_the_scale(scale: float, rank: int) -> None:
    assert alpha_of(scale, rank) / rank == pytest.approx(scale, rel=2.3e-16, abs=0)


@given(st.integers(1, 4096) | st.floats(1e-3, 1e4), st.integers(1, 512))
def test_the_scale_of_an_alpha_is_exact(alpha: float, rank: int) -> None:
    assert alpha_of(alpha / rank, rank) / rank == alpha / rank


def made_by_peft(kind: str, folder: Path, **settings: object) -> torch.Tensor:
    plain = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    if kind == "gpt2":
        plain["fan_in_fan_out"] = True
    model = peft.get_peft_model(base_of(kind).model, peft.LoraConfig(**plain | settings)).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        logits = model.eval()(TOKENS).logits
    model.save_pretrained(folder)
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_computes_the_same_here(tmp_path: Path, kind: str) -> None:
    theirs = made_by_peft(kind, tmp_path)
    adapter = read_peft(tmp_path)
    assert adapter.scale == 5 / 3
    assert set(adapter.names) == set(base_of(kind).targets)
    assert adapter.shapes == {name: base_of(kind).targets[name] for name in adapter.names}
    assert (theirs - ours(kind, adapter)).abs().max() < 1e-9


def edited(folder: Path, **changes: object) -> Path:
    write_peft(folder, adapter_of("llama"), "base")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected 'LORA'\n  Export the adapter again"),
        ({"use_dora": True}, "use_dora is True, expected False"),
        ({"bias": "lora_only"}, "bias is 'lora_only', expected 'none'"),
        ({"r": 4}, "r is 4, but its factors have rank 3"),
        ({"r": True}, "r is True, but"),
        ({"lora_alpha": float("nan")}, "values that are not finite floats"),
        *(({"r": wrong}, "holds no adapter that mta can read") for wrong in ("3", 0, None)),
        *(({"lora_alpha": wrong}, "holds no adapter that mta can read") for wrong in (None, 10**400)),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_peft(edited(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_or_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = edited(tmp_path) / name
    path.write_bytes(content or path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"holds no adapter that mta can read: .*\n  Export the adapter again"):
        read_peft(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=f"No such file or directory: .*{name}"):
        read_peft(tmp_path)


FIRST = "base_model.model.model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{FIRST}.lora_B.weight": None}, "expected tensors '<layer>.a' and '<layer>.b' in pairs"),
        ({f"{FIRST}.lora_magnitude_vector": torch.ones(2)}, f"the tensor '{FIRST}.lora_magnitude_vector' is not named"),
        ({FIRST.removeprefix("base_model.model.") + ".lora_A.weight": torch.ones(3, 2)}, "the tensor 'model.layers"),
        ({f"{FIRST}.lora_A.weight": torch.ones(3)}, "factors of 'model.layers.0.mlp.down_proj' do not fit together"),
        *(
            ({f"{FIRST}.lora_B.weight": torch.tensor([[wrong] * 3] * 16)}, "values that are not finite floats")
            for wrong in (float("nan"), float("inf"), 1)
        ),
    ],
)
def test_odd_tensors_are_refused(tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    path = edited(tmp_path) / WEIGHTS
    changed = load_file(path) | changes
    save_file({name: part for name, part in changed.items() if part is not None}, path)
    with pytest.raises(InputError, match=message):
        read_peft(tmp_path)


def test_only_one_adapter_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exactly one adapter, got a batch of 2\n  Choose one"):
        write_peft(tmp_path / "out", random_loras(base_of(), 2), "base")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file is a file, expected a folder to write an adapter to\n  Choose another"):
        write_peft(tmp_path / "file", adapter_of("llama"), "base")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_use_keeps_its_other_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_peft(out, adapter_of("llama"), "base")
    (out / "README.md").write_text("mine")
    newer = adapter_of("llama", seed=1, scale=3.0)
    write_peft(out, newer, "base")
    assert same(read_peft(out), newer)
    assert (out / "README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("done", range(3))
def test_a_failed_export_leaves_no_wrong_adapter_in_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """New weights beside the old alpha would be another adapter. Card, weights, and configuration are replaced."""
    out, old, newer = tmp_path / "out", adapter_of("llama"), adapter_of("llama", seed=1, scale=3.0)
    write_peft(out, old, "base")
    replace, left = Path.replace, [None] * done

    def until_full(path: Path, target: Path) -> Path:
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", until_full)
        with pytest.raises(OSError, match="No space left"):
            write_peft(out, newer, "base", card="a card")
    assert not (out / CONFIG).exists() or same(read_peft(out), old)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    write_peft(out, newer, "base")
    assert same(read_peft(out), newer)
