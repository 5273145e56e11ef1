"""Export a person's adapter, and forget the person with it."""

from dataclasses import replace
from pathlib import Path

import peft
import plain
import pytest
import torch
from conftest import personalizer
from crowd import PEOPLE, QUESTION, knowing, states_in
from tiny import base_of

from mta.config import MergeSettings
from mta.errors import PersonNotFound
from mta.lora.peft import WEIGHTS, read_peft
from mta.personalize import Forgotten

# -- export ------------------------------------------------------------------------------------------------------------


def tokens_asked(base, bank) -> tuple[int, ...]:
    return base.prompts.prompt(bank.task, bank.task.asked(QUESTION)).tokens


def loaded_by_peft(folder: Path):
    return peft.PeftModel.from_pretrained(base_of().model, folder).double()


def test_an_export_is_task_lora_merge_and_stack(known, tiny, tmp_path):
    """Exports are in float32, so every factor has a relative error of up to 6e-8."""
    base, bank = tiny
    known.export("x2", tmp_path / "out")
    adapter, state = read_peft(tmp_path / "out"), known.state("x2")
    assert {t.dtype for t in adapter.tensors().values()} == {torch.float32}
    assert adapter.rank == 3 * bank.anchors.rank + bank.task_lora.rank + 1
    merge = plain.merge(bank.anchors, state.anchors, torch.tensor(state.w, dtype=torch.float64))
    for name in adapter.names:
        expected = bank.task_lora.delta(name)[0] + merge[name] + state.stack.delta(name)[0]
        difference = adapter.to(torch.float64).delta(name)[0] - expected
        assert float(difference.norm() / expected.norm()) < 2e-7
    model = loaded_by_peft(tmp_path / "out")
    example = base.prompts.example(bank.task, bank.task.asked(QUESTION), "4")
    table = model(input_ids=torch.tensor([example.tokens])).logits[0].log_softmax(-1)
    score = sum(table[example.target_start - 1 + i, token] for i, token in enumerate(example.target))
    assert known.score([("x2", QUESTION, "4")]) == pytest.approx([float(score)], rel=0, abs=1e-4)


def test_an_anchor_with_weight_zero_adds_no_rank_to_an_export(tiny, tmp_path):
    personal = personalizer(*tiny, merge=MergeSettings(policy="top1", k=2))
    personal.personalize(PEOPLE[:1])
    assert personal.state("x0").w == (1.0, 0.0)
    personal.export("x0", tmp_path / "out")
    assert read_peft(tmp_path / "out").rank == 2 + 2 + 1


def test_an_export_without_a_merge_holds_no_anchors_factors(tiny, tmp_path):
    """As in a bank whose calibration found that merges do not help."""
    base, bank = tiny
    made = personalizer(*tiny, tmp_path / "people", merge=MergeSettings(policy="uniform", k=2))
    made.personalize(PEOPLE[:1])
    made.store.save("x0", replace(made.state("x0"), w=(0.0, 0.0), work="f" * 64))
    personal = personalizer(*tiny, tmp_path / "people")
    assert personal.export("x0", tmp_path / "out") == 0.0
    assert read_peft(tmp_path / "out").rank == bank.task_lora.rank + 1
    found = loaded_by_peft(tmp_path / "out")(input_ids=torch.tensor([tokens_asked(base, bank)])).logits
    with torch.inference_mode(), personal.applied(["x0"]):
        expected = base.model(input_ids=torch.tensor([tokens_asked(base, bank)])).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_compressed_export_reports_its_error(known, tmp_path, rank):
    known.export("x2", tmp_path / "whole")
    error = known.export("x2", tmp_path / "small", rank=rank)
    whole, small = (read_peft(tmp_path / name).to(torch.float64) for name in ("whole", "small"))
    assert small.rank == rank
    lost = sum(float((whole.delta(name) - small.delta(name)).square().sum()) for name in whole.names)
    total = sum(float(whole.delta(name).square().sum()) for name in whole.names)
    best = sum(float(torch.linalg.svdvals(whole.delta(name)[0])[rank:].square().sum()) for name in whole.names)
    assert error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert error == pytest.approx((best / total) ** 0.5, rel=1e-3)
    assert 0 < error < 1


def test_a_rank_that_is_enough_loses_nothing(known, tmp_path):
    assert known.export("x2", tmp_path / "whole", rank=64) == 0.0
    assert read_peft(tmp_path / "whole").rank == 9


# -- forget ------------------------------------------------------------------------------------------------------------


def test_forgetting_removes_only_the_person(own_bank, tmp_path):
    _, bank = own_bank
    personal = knowing(*own_bank, tmp_path / "people")
    personal.store.save_history(PEOPLE[0])
    assert personal.forget("x0") == Forgotten(True, [])
    with pytest.raises(PersonNotFound):
        personal.state("x0")
    assert personal.store.history("x0") is None
    assert len(states_in(tmp_path / "people")) == 4
    assert personal.forget("x0") == Forgotten(False, [])
    assert not (bank.folder / "needs-rebuild.json").exists()


def test_forgetting_removes_what_was_exported_and_names_what_it_could_not(own_bank, tmp_path):
    personal = knowing(*own_bank, tmp_path / "people")
    for name in ("one", "two", "three"):
        personal.export("x0", tmp_path / name)
    personal.export("x1", tmp_path / "four")
    (tmp_path / "three" / WEIGHTS).write_bytes((tmp_path / "four" / WEIGHTS).read_bytes())
    assert [Path(export.folder).name for export in personal.store.exports.of("x0")] == ["one", "two", "three"]
    assert personal.forget("x0") == Forgotten(True, [], [f"{tmp_path}/three (its adapter was changed since)"])
    assert [(tmp_path / name).exists() for name in ("one", "two", "three")] == [False, False, True]
    assert personal.forget("x0") == Forgotten(False, [])
    assert personal.forget("x1") == Forgotten(True, [])
    assert [(tmp_path / name).exists() for name in ("three", "four")] == [True, False]


@pytest.mark.parametrize("done", range(4))
def test_a_forgetting_that_is_killed_still_knows_the_exports(own_bank, tmp_path, monkeypatch, done):
    personal, unlink, left = knowing(*own_bank, tmp_path / "people"), Path.unlink, [done]
    for name in ("one", "two"):
        personal.export("x0", tmp_path / name)

    def killed(path, *how, **more):
        if path.parent.name in ("one", "two"):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        unlink(path, *how, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            personal.forget("x0")
    assert "x0" in personal.store
    missing = "its weights are missing: removed, renamed, or on a disk that is not mounted"
    gone = [f"{tmp_path / 'one'} ({missing})"] if done == 3 else []
    assert personal.forget("x0") == Forgotten(True, [], gone)
    assert not any((tmp_path / name).exists() for name in ("one", "two"))


def test_forgetting_works_without_a_store_which_would_know_of_exports(own_bank, tmp_path):
    personal = personalizer(*own_bank)
    personal.personalize(PEOPLE[:1])
    assert personal.export("x0", tmp_path / "out") == 0.0
    assert personal.forget("x0") == Forgotten(True, [])
    assert read_peft(tmp_path / "out").rank
    with pytest.raises(PersonNotFound):
        personal.state("x0")
