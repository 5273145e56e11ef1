"""The benchmark's own arithmetic and bookkeeping; no time is asserted here."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import base_of, random_loras

from benchmarks import kernels as each
from benchmarks.speed import __main__ as command
from benchmarks.speed import decoding, growth, limit, merging, pictures, point, record, report, timing
from benchmarks.speed.apart import Broken, apart
from benchmarks.speed.data import Absent
from benchmarks.speed.peers import _parts, padded
from benchmarks.speed.processor import Processor
from benchmarks.speed.settings import Settings
from benchmarks.speed.timing import Row
from mta.config import MergeSettings
from mta.data.tasks.prompt import Example
from mta.kernels import obstacle
from mta.lora.batch import Factors, LoraBatch
from mta.lora.merge import merge_exact
from mta.training.packing import pack

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings(repeats=1, people=2, quick=True)


def row(ratio=2.0, **more):
    return Row("a row", "mta", "peer", "people/min", (2 * ratio, 3 * ratio, 9 * ratio), (2.0, 3.0, 9.0), **more)


class TestTiming:
    def test_two_things_are_measured_in_turn_after_each_was_warmed_up(self):
        order = []
        rates = timing.turns(lambda: order.append("A") or 1.0, lambda: order.append("B") or 1.0, 3)
        assert "".join(order) == "AB" + "ABABAB"
        assert [len(each) for each in rates] == [3, 3]

    def test_what_is_warm_is_not_warmed_up(self):
        order = []
        timing.turns(lambda: order.append("A") or 1.0, lambda: order.append("B") or 1.0, 1, warm=False)
        assert order == ["A", "B"]

    def test_a_rate_is_work_per_second(self, monkeypatch):
        clock = iter((10.0, 14.0))
        monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
        assert timing.rate(lambda: 12.0) == 3.0

    def test_ratios_are_taken_turn_by_turn(self):
        measured = Row("a row", "mta", "peer", "x/s", (4.0, 30.0, 5.0), (2.0, 10.0, 1.0))
        assert measured.ratios == (2.0, 3.0, 5.0)
        assert measured.ratio == 3.0
        assert measured.spread == (2.0, 5.0)

    def test_a_slope_is_an_exponent(self):
        x = [1, 4, 16, 64]
        assert timing.slope(x, [3 * value**1.5 for value in x]) == pytest.approx(1.5)

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

    def test_what_is_not_shared_counts_for_each(self):
        examples = [Example((1, 2, 3, 4, 9), 3), Example((1, 2, 3, 5, 9), 3)]
        rows = pack(examples, attention_price=0.0, packed=False)
        assert limit.operations(rows, {"q": (1, 1)}, rank=0, hidden=1, vocabulary=1) == 8 * 4 + 4 * 4


class TestPeer:
    def test_a_batch_is_padded_right_and_learns_targets_only(self):
        batch = padded([Example((5, 6, 7, 8), 2), Example((5, 9), 1)])
        assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
        assert batch["labels"].tolist() == [[-100, -100, 7, 8], [-100, 9, -100, -100]]

    def test_long_texts_go_through_in_parts_of_bounded_size(self):
        examples = [Example(tuple(range(length)), 1) for length in (1000, 900, 900, 3000, 10)]
        assert [[len(one.tokens) for one in part] for part in _parts(examples)] == [[1000, 900], [900], [3000], [10]]

    def test_a_process_of_its_own_answers_as_the_thing_itself_and_says_what_broke(self):
        with apart(Counted, torch.arange(3)) as there:
            assert there.times(2).tolist() == [0, 2, 4]
            assert there.process() != os.getpid()
            with pytest.raises(Broken, match=r"ValueError: not 3"):
                there.times(3)
            assert there.times(1).tolist() == [0, 1, 2]


class Counted:
    def __init__(self, numbers):
        self.numbers = numbers

    def times(self, factor):
        if factor == 3:
            raise ValueError("not 3")
        return factor * self.numbers

    def process(self):
        return os.getpid()


class TestRecords:
    def test_a_row_survives_the_file(self, tmp_path):
        path = tmp_path / "bench-x.json"
        kept = row(target=1.5, difference=1e-6, more={"curve": "people", "x": [1, 2]})
        record.write(path, [record.record(kept, "growth", SETTINGS)], "python -m benchmarks.speed")
        (found,) = record.kept(path)
        assert record.row_of(found) == kept
        assert (found["verdict"], found["ratio"]) == ("met", 2.0)

    def test_the_file_says_what_computed_and_names_no_place(self, tmp_path):
        path = tmp_path / "bench-x.json"
        record.write(path, [record.record(row(), "bank", SETTINGS)], "python -m benchmarks.speed")
        whole = json.loads(path.read_text())
        assert {"processor", "cores", "instructions", "versions", "date", "commit", "command", "rows"} == set(whole)
        assert {"torch", "transformers", "peft"} < set(whole["versions"])
        assert str(ROOT) not in path.read_text()
        assert os.uname().nodename not in path.read_text()

    def test_a_row_measured_again_takes_the_place_of_the_old_one(self):
        old = [record.record(Row(name, "", ""), module, SETTINGS) for name, module in (("1", "bank"), ("2", "growth"))]
        new = record.record(Row("1", "other", ""), "bank", SETTINGS)
        more = record.record(Row("3", "", ""), "limit", SETTINGS)
        found = record.merged(record.merged(old, new), more)
        assert [one["name"] for one in found] == ["1", "3", "2"]
        assert found[0]["ours"] == "other"

    def test_a_row_is_current_for_a_day_while_code_and_settings_are_and_it_did_not_fail(self):
        told = record.record(row(), "bank", SETTINGS)
        assert record.current(told, SETTINGS)
        assert not record.current(told, Settings(repeats=2))
        assert not record.current({**told, "code": "other"}, SETTINGS)
        assert not record.current({**told, "date": "2020-01-01T00:00:00+00:00"}, SETTINGS)
        assert not record.current({**told, "skipped": f"{record.FAILED}Unequal"}, SETTINGS)

    def test_no_file_is_no_rows(self, tmp_path):
        assert record.kept(tmp_path / "missing.json") == []


class TestReport:
    def test_every_row_has_all_columns(self):
        for one in (row(target=1.0), Row("a row", "mta", "peer", skipped="no data"), Row("a curve", "mta", "")):
            assert len(report.cells(one)) == 7
        assert report.table([row(target=1.0)]).row_count == 1

    def test_markdown_leaves_out_what_was_skipped(self):
        text = report.markdown([row(target=1.5), Row("gone", "mta", "peer", skipped="no data")], "A processor", 2)
        assert "| a row | mta: 6 people/min | peer: 3 people/min | **2.00x** | 1.5x met |" in text
        assert "gone" not in text

    @pytest.mark.parametrize(
        ("value", "text"), [(0, "0"), (0.0123, "0.0123"), (4.561, "4.56"), (1234, "1234"), (8.32e11, "832G")]
    )
    def test_numbers_have_three_digits(self, value, text):
        assert report.number(value) == text

    def test_a_curve_becomes_two_pictures(self, tmp_path):
        more = {"curve": "people", "x": [1, 4, 16], "x_label": "people", "series": {"seconds": [2, 8, 30]}}
        paths = pictures.draw({**more, "slopes": {"seconds": 0.98}}, tmp_path)
        assert sorted(path.name for path in paths) == ["growth-people.png", "growth-people.svg"]
        assert all(path.stat().st_size > 1000 for path in paths)
        assert pictures.draw({}, tmp_path) == []


class TestCommand:
    def modules(self, monkeypatch, **rows):
        made = {
            f"benchmarks.speed.{name}": type("Module", (), {"rows": staticmethod(how)}) for name, how in rows.items()
        }
        monkeypatch.setattr(command.importlib, "import_module", made.__getitem__)
        monkeypatch.setattr(command, "quiet", lambda: None)

    def test_rows_are_kept_and_not_measured_again_unless_asked_for(self, tmp_path, monkeypatch, capsys):
        measured = []

        def rows(settings):
            if settings.wanted("a row"):
                measured.append(settings.repeats)
                yield row(target=1.0)

        self.modules(monkeypatch, bank=rows)
        words = ["--only", "bank", "--out", str(tmp_path)]
        assert [command.main(words + more) for more in ([], [], ["--again"], ["--repeats", "7"])] == [0] * 4
        assert measured == [2, 2, 7]
        assert "met" in capsys.readouterr().out

    def test_what_is_absent_is_skipped_and_what_breaks_fails_but_stops_nothing(self, tmp_path, monkeypatch, capsys):
        def absent(settings):
            raise Absent("no reviews")
            yield

        def broken(settings):
            raise RuntimeError("secret")
            yield

        self.modules(monkeypatch, bank=absent, limit=broken, merging=lambda settings: iter([row()]))
        assert command.main(["--only", "bank,limit,merging", "--out", str(tmp_path)]) == 1
        (path,) = tmp_path.glob("bench-*.json")
        kept = {one["module"]: one["skipped"] for one in record.kept(path)}
        assert kept == {"bank": "no reviews", "limit": "failed: RuntimeError", "merging": ""}
        assert command.main(["--markdown", "--out", str(tmp_path)]) == 0
        assert "| a row |" in capsys.readouterr().out

    def test_rows_that_a_module_no_longer_has_are_dropped(self, tmp_path, monkeypatch):
        for names in (["old", "kept"], ["kept", "new"]):
            self.modules(monkeypatch, bank=lambda settings, names=names: (Row(name, "", "") for name in names))
            command.main(["--only", "bank", "--again", "--out", str(tmp_path)])
        (path,) = tmp_path.glob("bench-*.json")
        assert [one["name"] for one in record.kept(path)] == ["kept", "new"]

    def test_a_module_that_is_not_there_is_refused(self, capsys):
        with pytest.raises(SystemExit):
            command.parsed(["--only", "bank,cooking"])
        assert "'cooking' is none of" in capsys.readouterr().err

    def test_a_processor_becomes_part_of_a_file_name(self):
        assert Processor("Intel(R) Xeon(R) CPU @ 2.60GHz", 2, ()).slug == "intel-xeon"
        assert Processor("AMD EPYC 9R14", 2, ("avx512_bf16",)).slug == "amd-epyc-9r14"
        assert Processor("x", 2, ("avx512_bf16",)).has_bf16


class TestMerging:
    def test_chunks_together_are_everybodys_merges(self, monkeypatch):
        monkeypatch.setattr(merging, "_CHUNK", 2)
        bank = random_loras(base_of(), 6)
        work = merging.Work.of(bank, 5, MergeSettings(mode="exact"))
        chunks = list(work.chunks())
        assert [len(chunk) for chunk in chunks] == [2, 2, 1]
        whole = merge_exact(bank, work.merge.ids, work.merge.w)
        assert all(
            torch.equal(x, y) for x, y in zip(chunks[2].tensors().values(), whole.select([4]).tensors().values())
        )
        assert work.run() == 5

    def test_updates_are_compared_not_factors(self):
        one = random_loras(base_of(), 1)
        other = LoraBatch({name: Factors(2 * a, b / 2) for name, (a, b) in one.factors.items()}, one.scale)
        assert merging.apart_by_update(other, one) < 1e-15
        last = LoraBatch(
            {name: Factors(a, b * (1.5 if "down" in name else 1)) for name, (a, b) in one.factors.items()}, 0.5
        )
        assert merging.apart_by_update(last, one) == pytest.approx(0.5)


class TestDecoding:
    def test_people_that_both_have_are_compared(self):
        found, expected = torch.tensor([[3.0, 4.0], [9.0, 9.0]]), torch.tensor([[3.0, 5.0]])
        assert decoding.apart(found, expected) == pytest.approx(1 / 34**0.5)
        assert decoding.share_of_equal([[1, 2, 3, 4], [5, 5]], [[1, 2, 0, 0]]) == 0.5

    def test_nothing_ends_an_answer_within_the_block(self):
        base = base_of()
        before = base.stop_tokens
        with decoding._never_ending(base, 260):
            assert base.stop_tokens == [260]
        assert base.stop_tokens == before


class TestGrowth:
    def measure(self, monkeypatch, asked):
        def measure(kind, x, settings, people=2):
            asked.append((kind, *x))
            if kind == "in-turn":
                return {"before": 2**30, "peak": 3 * 2**30, "few": [1.5, 2.5], "many": [4.0]}
            return {"before": 2**30, "peak": 2**30 * (1 + x[0]), "seconds": 2.0 * x[0]}

        monkeypatch.setattr(growth, "measure", measure)

    def test_rows_and_slopes_by_hand(self, monkeypatch):
        asked = []
        self.measure(monkeypatch, asked)
        people, ratio, memory, anchors, prompts = growth.rows(dataclasses.replace(SETTINGS, memory="3GiB"))
        assert asked == [
            ("people", 1),
            ("in-turn", 2, 4, 1),
            *(("anchors", x) for x in (2, 4)),
            *(("tokens", x) for x in (64, 128)),
        ]
        assert people.more["series"]["seconds per person"] == [2.0, 1.0]  # of 4 people in 4 seconds
        assert people.more["slopes"]["seconds per person"] == pytest.approx(-0.5)
        assert ratio.ratio == (4 / 4.0) / (2 / 2.0)  # 2 people took 1.5 seconds before, 2.5 after
        assert (memory.ratio, memory.verdict) == (3 / 2, "met")
        assert anchors.more["slopes"] == pytest.approx({"seconds": 1.0, "GiB above the base": 1.0})
        assert prompts.more["x"] == [64, 128]

    def test_what_is_done_is_not_measured_again(self, monkeypatch):
        asked = []
        self.measure(monkeypatch, asked)
        done = {"growth with people", "4 people against 2", "memory of 4 people", "growth with prompts"}
        rows = list(growth.rows(Settings(repeats=1, quick=True, done=frozenset(done))))
        assert [row.name for row in rows] == ["growth with anchors"]
        assert {kind for kind, _ in asked} == {"anchors"}

    def test_a_point_is_measured_until_it_is_known_well_enough(self, monkeypatch):
        clock = iter(range(100))
        monkeypatch.setattr(point.time, "perf_counter", lambda: next(clock))
        found = point.measured(lambda: None)
        assert (found["runs"], found["seconds"]) == (2, 1)
        assert found["before"] > 0
        assert found["peak"] > 0

    def test_made_up_anchors_have_the_shapes_of_the_base(self):
        base = base_of()
        bank = point.bank_of(base, 3)
        assert (len(bank), bank.rank, bank.shapes) == (3, 8, base.targets)


@pytest.mark.skipif(bool(obstacle()), reason=f"no kernels here: {obstacle()}")
def test_families_of_kernels_are_measured_alone_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(each, "base_of", cache(lambda dtype: base_of()))
    words = ["--out", str(tmp_path / "kernels.json"), "--repeats", "2", "--tokens", "1"]
    words += ["--only", "adapted_rows", "side_by_side"]
    each.main(words)
    kept = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert set(kept) == {
        f"{what}, {dtype}, {family}"
        for what, family in (("decoding", "adapted_rows"), ("merging", "side_by_side"))
        for dtype in ("bfloat16", "float32")
    }
    assert all(row["on_s"] > 0 and row["off_s"] > 0 for row in kept.values())
    assert len(capsys.readouterr().out.splitlines()) == 4
    each.main(words)  # nothing is measured again
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.network
def test_merging_is_measured_from_end_to_end(tmp_path, fetched):
    fetched("smollm2-135m-instruct"), fetched("movielens-100k")
    words = ["--only", "merging", "--quick", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "benchmarks.speed", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("bench-*.json")
    assert all(one["rates"] or one["skipped"] for one in record.kept(path))
