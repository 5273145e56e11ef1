"""From records to tables and pictures: numbers worked out by hand, and what is left out where something is missing."""

from pathlib import Path

import pytest
from conftest import TINY_RUN

from mta.bank.calibration.info import CalibrationInfo, Gain
from mta.data.tasks import load_task
from mta.evaluation.methods import Base, MergeThenAdapt, OneLora, TaskLora
from mta.evaluation.reports.tables import rows_of
from mta.evaluation.statistics import Interval
from mta_lab.experiments.recipe import Experiment, Part
from mta_lab.experiments.results import Record, Results, latest
from mta_lab.reports import figures
from mta_lab.reports.exhibits import sections
from mta_lab.reports.sets import overview, primary

METHODS = (Base(), TaskLora(), OneLora(), MergeThenAdapt())
PEOPLE = [f"{n:012x}" for n in range(24)]


def record(method, person, *, seed=0, shots=8, nll=(1.0, 1.0), mae=1.0, **more):
    where = {"kind": method.method, "method": method.name, "bank": "main", "seed": seed, "shots": shots}
    metrics = {"MAE": mae, "accuracy": 0.5, "NLL": sum(nll) / len(nll)}
    return Record(**where, person=person, metrics=metrics, nll=nll, **{"seconds": 2.0, "bytes": 10.0, **more})


def results(records, exhibits=None, meta=None, **how):
    parts = exhibits or {"main": (Part(methods=METHODS),)}
    recipe = Experiment(run=TINY_RUN, exhibits=parts, **how)
    about = {"exhibits": list(parts)} | (meta or {})
    return Results(Path("runs"), recipe, load_task("movielens-rating"), latest(records), {"data": "made up"}, about, {})


def everybody(method, shift=0.0, seeds=(0,), **more):
    own = {"nll": (1.0 + shift, 1.2 + shift), "mae": 1 + shift} | more
    return [record(method, p, seed=s, **own) for p in PEOPLE for s in seeds]


def test_differences_and_harm_are_those_of_the_records():
    found = results([*everybody(TaskLora()), *everybody(OneLora(), 0.1), *everybody(MergeThenAdapt(), -0.25)])
    heads, rows = rows_of(found.comparison("main"))
    by_name = {row[0]: dict(zip(heads, row)) for row in rows}
    assert list(by_name) == ["task LoRA", "OPPU", "MTA"]  # the base has not been run
    assert by_name["MTA"]["NLL"] == "0.850"
    assert by_name["MTA"]["NLL against task LoRA"] == "**-0.250 [-0.250, -0.250]**"
    assert by_name["MTA"]["MAE against OPPU"] == "**-0.350 [-0.350, -0.350]**"
    assert by_name["OPPU"]["worse off"] == "24 of 24"
    assert by_name["OPPU"]["clearly"] == "24"
    assert by_name["MTA"]["worse off"] == "0 of 24"
    assert by_name["MTA"]["s per person"] == "2.00"
    assert by_name["task LoRA"]["NLL against task LoRA"] == ""


def test_controls_are_compared_with_mta():
    rows = [*everybody(TaskLora()), *everybody(OneLora(), -0.1), *everybody(MergeThenAdapt(), -0.25)]
    (section,) = sections(results(rows, {"controls": (Part(methods=METHODS),)}))
    assert "| MTA against | NLL |" in section.text
    assert "| OPPU | **-0.150 [-0.150, -0.150]** |" in section.text
    assert "| task LoRA | **" not in section.text.rpartition("| MTA against")[2]


def test_seeds_are_averaged_person_by_person_and_only_those_that_all_have():
    rows = [*everybody(TaskLora(), 0.0, (0, 1)), *everybody(MergeThenAdapt(), -0.1, (0,))]
    rows += [r.model_copy(update={"seed": 1}) for r in everybody(MergeThenAdapt(), -0.3)]
    rows += everybody(OneLora(), 0.0, (0, 1, 2))
    found = results(rows)
    assert found.seeds("main") == [0, 1]
    assert found.comparison("main").difference("MTA", "task LoRA", "NLL").mean == pytest.approx(-0.2)
    base = [*rows, *everybody(Base(), 0.5)]  # knows no bank, so has one seed's answers only
    assert results(base).comparison("main").score("base", "NLL").mean == pytest.approx(1.6)


def test_comparisons_named_in_advance_are_corrected_for_their_number():
    noisy = [r.model_copy(update={"metrics": {"NLL": 1.1 + n % 5 - 1.6}}) for n, r in enumerate(everybody(OneLora()))]
    rows = [*everybody(TaskLora()), *noisy, *everybody(MergeThenAdapt(), -0.25)]
    sets = [results(rows, primary=("task LoRA", "OPPU", "never run")), results(rows, primary=("task LoRA",))]
    table = primary(sets)
    assert "Corrected for 4 comparisons" in table
    assert "| made up | never run |  |  |  | not run |  |" in table
    assert table.count("| made up | task LoRA | 24 | 24 | 1 | -0.250 [-0.250, -0.250] | < 0.0001 |") == 2
    (alone,) = [line for line in table.splitlines() if "OPPU" in line]
    interval = sets[0].comparison("main").resampled("MTA", "OPPU", "NLL", 200_000).interval(1 - 0.05 / 4)
    assert f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]" in alone
    assert primary([results(rows)]) == ""


def test_a_named_comparison_does_not_depend_on_other_methods():
    rows = [*everybody(TaskLora()), *everybody(MergeThenAdapt(), -0.25)]
    some = [*rows, *everybody(OneLora())[:10]]
    (whole,), (line,) = (
        [one for one in primary([results(r, primary=("task LoRA",))]).splitlines() if "made up" in one]
        for r in (rows, some)
    )
    assert line == whole


def test_a_seed_that_was_interrupted_is_left_out():
    rows = [*everybody(TaskLora()), *everybody(MergeThenAdapt(), -0.1)]
    begun = [r.model_copy(update={"seed": 1}) for r in (*everybody(TaskLora())[:5], *everybody(MergeThenAdapt())[:5])]
    found = results([*rows, *begun], seeds=(0, 1))
    assert found.seeds("main") == [0]
    assert found.comparison("main").people == len(PEOPLE)


def test_a_seed_of_fewer_people_stays_if_no_more_were_asked_for():
    rows = [*everybody(TaskLora()), *everybody(MergeThenAdapt(), -0.1)]
    few = [r.model_copy(update={"seed": 1}) for r in (*everybody(TaskLora())[:5], *everybody(MergeThenAdapt())[:5])]
    assert results([*rows, *few], seeds=(0, 1), compared=5).seeds("main") == [0, 1]


def test_few_independent_people_are_mentioned_beside_their_intervals():
    some = [*everybody(TaskLora())[:19], *everybody(MergeThenAdapt(), -0.25)[:19]]
    assert "Fewer than 20 independent units" in sections(results(some))[0].text
    assert "Fewer than 20" not in sections(results([*everybody(TaskLora()), *everybody(MergeThenAdapt())]))[0].text


def test_only_people_with_answers_of_every_method_are_compared():
    found = results([*everybody(TaskLora()), *everybody(MergeThenAdapt())[:20]]).comparison("main")
    assert [row.people["NLL"].shape[1] for row in found.rows] == [20, 20]


def test_shots_are_compared_each_with_the_pooled_model_at_the_same_number():
    parts = {"shots": (Part(methods=(TaskLora(), MergeThenAdapt()), shots=(1, 8)),)}
    rows = [*everybody(TaskLora(), 0.3, shots=1), *everybody(MergeThenAdapt(), 0.2, shots=1)]
    rows += [*everybody(TaskLora(), 0.1), *everybody(MergeThenAdapt(), -0.3)]
    (section,) = sections(results(rows, parts))
    assert "| MTA | **-0.100 [-0.100, -0.100]** | **-0.400 [-0.400, -0.400]** |" in section.text
    assert "1 shot (24 people)" in section.text
    assert list(section.pictures) == ["shots"]


def test_numbers_of_shots_are_compared_by_the_seeds_that_all_were_run_with():
    parts = {"shots": (Part(methods=(TaskLora(), MergeThenAdapt()), shots=(1, 8)),)}
    rows = [*everybody(TaskLora(), shots=1), *everybody(MergeThenAdapt(), shots=1)]
    rows += [*everybody(TaskLora(), seeds=(0, 1)), *everybody(MergeThenAdapt(), seeds=(0, 1))]
    (section,) = sections(results(rows, parts, seeds=(0, 1)))
    assert section.text.startswith("NLL against the task LoRA, seed 0.")
    alike = [row for row in rows if row.seed == 0]
    (section,) = sections(results(alike, parts))
    assert section.text.startswith("NLL against the task LoRA. ")


def test_seeds_stand_beside_each_other_and_together():
    parts = {"seeds": (Part(methods=(TaskLora(), MergeThenAdapt())),)}
    alone = [*everybody(TaskLora()), *everybody(MergeThenAdapt(), -0.1)]
    (section,) = sections(results(alone, parts))
    assert "seed 0 (" not in section.text  # one seed says nothing of how seeds differ
    another = [*everybody(TaskLora(), 0.2), *everybody(MergeThenAdapt(), 0.08)]
    rows = [*alone, *(r.model_copy(update={"seed": 1}) for r in another)]
    (section,) = sections(results(rows, parts, seeds=(0, 1)))
    each = " | ".join(f"**{d} [{d}, {d}]**" for d in ("-0.100", "-0.120"))
    assert f"| MTA | {each} | -0.110 [-0.2" in section.text  # two seeds say little
    assert "| seed 1 (24 people) | all (24 people) |" in section.text
    assert list(section.pictures) == ["seeds"]


def test_numbers_in_names_become_an_axis(tmp_path):
    three = [MergeThenAdapt(name=f"by loss, K = {k}", merge={"policy": "uniform", "k": k}) for k in (1, 2, 4)]
    parts = {"k": (Part(methods=(TaskLora(), *three)),)}
    rows = [*everybody(TaskLora()), *(r for n, m in enumerate(three) for r in everybody(m, -0.1 * n))]
    (section,) = sections(results(rows, parts))
    assert list(section.pictures) == ["k"]
    section.pictures["k"].save(tmp_path / "k")
    assert "by loss" in (tmp_path / "k.svg").read_text()


def test_time_and_bytes_are_fitted_up_to_a_million_people():
    parts = {"efficiency": (Part(methods=(OneLora(), MergeThenAdapt())),)}
    found = results([*everybody(OneLora(), bytes=1e6), *everybody(MergeThenAdapt(), bytes=1e3)], parts)
    assert not sections(found)  # the cost of the bank is unknown
    found.facts["main-0"] = {"seconds": {"task LoRA": 600.0, "anchors": 3000.0}, "bytes": 5e6}
    (section,) = sections(found)
    assert "| OPPU | 24 | 10.0 min | 2.00 | 10.8 min | 556 h | 250 kB | 1 MB | 1 TB |" in section.text
    assert "| MTA | 24 | 60.0 min | 2.00 | 60.8 min | 557 h | 5 MB | 1 kB | 1 GB |" in section.text


def test_a_report_says_what_the_banks_cards_expect():
    gain = Gain(shots=8, people=24, mean=0.03, low=0.01, high=0.05, worse=0.25)
    calibration = CalibrationInfo(ridge=0.3, prior=4.0, rate=0.0, people=24, gains=(gain,))
    found = results([*everybody(OneLora()), *everybody(TaskLora())], {"main": (Part(methods=(OneLora(), TaskLora())),)})
    assert not any("cards" in section.title for section in sections(found))
    found.facts["main-0"] = {"calibration": calibration.model_dump(mode="json")}
    section = sections(found)[-1]
    assert section.title == "What the banks' cards expect"
    assert "counts as much as 4 of a person's shots" in section.text
    assert "| 8 | merge | +0.030 [+0.010, +0.050] | 25% | 24 |" in section.text


def test_sets_stand_side_by_side():
    one = results([*everybody(TaskLora()), *everybody(MergeThenAdapt(), -0.25)])
    table = overview([one, results(everybody(TaskLora()))])
    assert "| MTA | 0.750 [0.750, 0.750] | **-0.250 [-0.250, -0.250]** | 0% |  |  |  |" in table
    assert "made up (24 people): MAE" in table
    assert overview([results(everybody(TaskLora()), {"mine": (Part(methods=METHODS),)})] * 2) == ""
    assert "| task LoRA |" in overview([results(everybody(TaskLora()), {"rivals": (Part(methods=METHODS),)})])


def test_an_outlier_is_drawn_at_the_edge_and_equal_numbers_give_equal_bytes(tmp_path):
    near = [(f"m{n}", Interval(0.01 * n, 0.01 * n - 0.02, 0.01 * n + 0.02)) for n in range(8)]
    for name in ("one", "two"):
        figures.forest([*near, ("far", Interval(9.0, 8.9, 9.1))], "NLL").save(tmp_path / name)
    assert "+9.00" in (tmp_path / "one.svg").read_text()
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"
