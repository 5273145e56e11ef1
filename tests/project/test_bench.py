"""Arithmetic and records of the benchmark. No test asserts a time."""

import json
from pathlib import Path

import pytest
import torch
from tiny import base_of, random_loras

from benchmarks.speed import limit, merging, record, timing
from benchmarks.speed.peers import padded
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Row
from mta.data.tasks.prompt import Example
from mta.lora.merge import merge_exact
from mta.training.packing import pack

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings(repeats=1, people=2, quick=True)


def row(ratio=2.0, **more):
    return Row("a row", "mta", "peer", "people/min", (2 * ratio, 3 * ratio, 9 * ratio), (2.0, 3.0, 9.0), **more)


class TestTiming:
    def test_turns_warms_both_up_and_then_alternates(self):
        order = []
        rates = timing.turns(lambda: order.append("A") or 1.0, lambda: order.append("B") or 1.0, 3)
        assert "".join(order) == "AB" + "ABABAB"
        assert [len(each) for each in rates] == [3, 3]

    def test_ratios_are_taken_turn_by_turn(self):
        measured = Row("a row", "mta", "peer", "x/s", (4.0, 30.0, 5.0), (2.0, 10.0, 1.0))
        assert (measured.ratios, measured.ratio, measured.spread) == ((2.0, 3.0, 5.0), 3.0, (2.0, 5.0))

    @pytest.mark.parametrize(
        ("measured", "verdict"),
        [
            (row(5.0, target=5.0), "met"),
            (row(4.99, target=5.0), "missed"),
            (row(5.0), ""),
            (Row("a row", "mta", "peer", target=5.0, skipped="no data"), "skipped: no data"),
        ],
    )
    def test_a_verdict_needs_a_target_and_a_measurement(self, measured, verdict):
        assert measured.verdict == verdict


class TestOperations:
    def test_two_examples_that_share_a_prompt_by_hand(self):
        # Fed are 1 2 3, shared, then 4 and 5: five tokens. Predicted are 4 and 5 at 3 (one place), 9 at 4 and at 5.
        rows = pack([Example((1, 2, 3, 4, 9), 3), Example((1, 2, 3, 5, 9), 3)], attention_price=0.0)
        shapes = {"q": (10, 20), "down": (30, 10)}
        frozen, factors = 10 * 20 + 30 * 10, 2 * (10 + 20 + 30 + 10)
        by_hand = 5 * (4 * frozen + 6 * factors) + 3 * 4 * 10 * 100
        assert limit.operations(rows, shapes, rank=2, hidden=10, vocabulary=100) == by_hand == 26200


class TestPeer:
    def test_a_batch_is_padded_right_and_learns_targets_only(self):
        batch = padded([Example((5, 6, 7, 8), 2), Example((5, 9), 1)])
        assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
        assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 9, -100, -100]]


class TestRecords:
    def test_a_written_row_is_read_back(self, tmp_path):
        path = tmp_path / "bench-x.json"
        kept = row(target=1.5, difference=1e-6, more={"people": 2})
        record.write(path, [record.record(kept, "decoding", SETTINGS)], "python -m benchmarks.speed")
        (found,) = record.kept(path)
        assert record.row_of(found) == kept
        assert (found["verdict"], found["ratio"]) == ("met", 2.0)

    def test_the_file_names_processor_and_versions_but_no_path_or_host(self, tmp_path, monkeypatch):
        host = "a-host-of-mine"
        monkeypatch.setattr("platform.node", lambda: host)
        monkeypatch.setattr("socket.gethostname", lambda: host)
        path = tmp_path / "bench-x.json"
        record.write(path, [record.record(row(), "limit", SETTINGS)], "python -m benchmarks.speed")
        whole = json.loads(path.read_text())
        assert {"processor", "cores", "instructions", "versions", "date", "commit", "command", "rows"} == set(whole)
        assert {"torch", "transformers", "peft"} < set(whole["versions"])
        assert not [place for place in (str(ROOT), host) if place in path.read_text()]

    def test_a_new_measurement_replaces_the_row_of_its_name(self):
        parts = {"1": "coefficients", "2": "decoding"}
        old = [record.record(Row(name, "", ""), module, SETTINGS) for name, module in parts.items()]
        new = record.record(Row("1", "other", ""), "coefficients", SETTINGS)
        more = record.record(Row("3", "", ""), "limit", SETTINGS)
        found = record.merged(record.merged(old, new), more)
        assert [(one["name"], one["ours"]) for one in found] == [("1", "other"), ("3", ""), ("2", "")]


class TestMerging:
    def test_merging_in_chunks_equals_merging_everybody(self, monkeypatch):
        monkeypatch.setattr(merging, "_CHUNK", 2)
        bank = random_loras(base_of(), 6)
        work = merging.Work.of(bank, 5, "exact")
        chunks = list(work.chunks())
        assert [len(chunk) for chunk in chunks] == [2, 2, 1]
        whole = merge_exact(bank, work.merge.ids, work.merge.w)
        assert all(
            torch.equal(x, y) for x, y in zip(chunks[2].tensors().values(), whole.select([4]).tensors().values())
        )
        assert work.run() == 5
