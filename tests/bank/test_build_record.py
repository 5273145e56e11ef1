"""What a built bank says of itself: its card, metrics, and times; and what it refuses to write."""

import json
import shutil

import pytest
import torch
import yaml
from builds import CANDIDATES, TASK_PEOPLE, build, changed
from conftest import TINY_RUN, HashEncoder
from safetensors.torch import load_file
from tiny import base_of

from mta.bank.bank import Bank
from mta.bank.build import build_bank
from mta.bank.context import Build
from mta.bank.format import ANCHORS, read_info, with_hash
from mta.config import Run, Training
from mta.data.tasks import load_task
from mta.errors import Diverged


def test_the_card_says_what_the_bank_is_and_how_to_build_it_again(built):
    info, text = read_info(built), (built / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: merge-then-adapt\n")
    assert "\n# A bank of 3 anchors for `movielens-rating`\n" in text
    assert f"| base fingerprint | `{info.base_fingerprint}` |" in text
    assert "| people behind the task LoRA / candidates for anchors | 7 / 12 |" in text
    assert "| cut | 6 items left out, 0 texts shortened |" in text
    recipe = text.partition("```yaml\n")[2].partition("```")[0]
    assert Run.model_validate(yaml.safe_load(recipe)) == TINY_RUN == info.run


def test_every_line_of_the_metrics_is_a_step(built):
    rows = [json.loads(line) for line in (built / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["stage"] != "calibration"]
    assert [(row["stage"], row["step"]) for row in trained] == [
        (stage, n) for stage in ("task LoRA", "anchors") for n in (1, 2, 3, 4)
    ]
    assert all(row["loss"] > 0 for row in trained)
    assert all(0 < row["examples"] <= row["examples_total"] for row in rows)
    assert read_info(built).seconds == {
        stage: round(sum(row["seconds"] for row in rows if row["stage"] == stage), 1)
        for stage in ("task LoRA", "anchors", "calibration")
    }


def test_anchors_begin_from_one_a_or_each_from_its_own(tmp_path):
    """Without a training step, every A keeps its initial value."""
    still = {"training": TINY_RUN.bank.training.model_copy(update={"steps": 0})}
    for start in ("same", "own"):
        folder = build(tmp_path / start, run=changed("bank", start=start, **still))
        factors = [a for name, a in load_file(folder / ANCHORS).items() if a.shape[-2] == 2 and a.abs().sum() > 0]
        assert factors
        assert all(torch.equal(a[0], a[1]) == (start == "same") for a in factors)


def test_a_finished_bank_takes_over_another_limit_of_answers_and_stays_the_same_bank(built, tmp_path):
    shutil.copytree(built, tmp_path / "bank")
    before, base = read_info(built), base_of()
    limited = load_task("movielens-rating").model_copy(update={"answer_tokens": 40})
    build_bank(Build(base, limited, HashEncoder(), TASK_PEOPLE, CANDIDATES, TINY_RUN, tmp_path / "bank"))
    after = read_info(tmp_path / "bank")
    assert (after.hash, after.work, after.files) == (before.hash, before.work, before.files)
    assert Bank.open(tmp_path / "bank", base).task == limited
    assert before.task.answer_tokens is None
    assert with_hash(after).hash == before.hash


@pytest.mark.parametrize(("group", "stage"), [("task_lora", "task LoRA"), ("bank", "anchors")])
def test_a_bank_whose_training_diverges_is_not_written_and_its_checkpoint_is_removed(tmp_path, group, stage):
    steep = Training(lr=1e250, steps=4, batch_size=4)
    with pytest.raises(Diverged, match=f"training of the {stage} diverged") as raised:
        build(tmp_path / "bank", run=changed(group, training=steep))
    assert raised.value.hint == f"Lower {group}.training.lr."
    assert not (tmp_path / "bank" / "bank.json").exists()
    assert not list((tmp_path / "bank").rglob("*.checkpoint"))
