"""The time left of a demo, and the version of its recipe that runs."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mta.config import override
from mta.config.loader import dump_yaml
from mta.errors import ConfigError
from mta.system.progress import Step
from mta.tools import demo
from mta.tools.demo import Clock, load_demo

MINUTES = {"assets": 1.0, "task LoRA": 2.0, "anchors": 2.0, "methods": 5.0}


@pytest.fixture
def reported(monkeypatch):
    """A clock whose start and steps are 60 seconds apart, and what it reports."""
    ticks, reports = itertools.count(0, 60), []
    monkeypatch.setattr(demo, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    return Clock(MINUTES, lambda share, left: reports.append((round(share, 3), round(left)))), reports


def test_the_time_of_all_stages_is_expected_before_the_first_step(reported):
    clock, reports = reported
    clock.begin()
    assert reports == [(0.0, 600)]


def test_the_time_left_follows_the_pace_so_far(reported):
    clock, reports = reported
    for done in (0, 50, 100):
        clock.step("task LoRA", Step(1, 1, done, 100))
    assert reports == [(0.1, 540), (0.2, 480), (0.3, 420)]


def test_slow_loading_alone_does_not_change_the_pace_much(monkeypatch):
    ticks, reports = iter([0.0, 120.0, 240.0]), []
    monkeypatch.setattr(demo, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    clock = Clock({"assets": 0.5, "task LoRA": 2.0, "methods": 5.5}, lambda share, left: reports.append(round(left)))
    clock.step("task LoRA", Step(1, 1, 0, 100))
    clock.step("task LoRA", Step(1, 1, 75, 100))
    assert reports == [900, 720]  # of 7.5 and 6 minutes; the measured pace alone would expect 1800 seconds at first


def test_steps_of_any_other_stage_belong_to_the_last_which_goes_at_the_same_pace(reported):
    clock, reports = reported
    clock.step("task LoRA", Step(1, 1, 100, 100))
    clock.step("anchors", Step(1, 1, 100, 100))
    clock.step("OPPU", Step(1, 1, 1, 100))
    clock.step("MTA", Step(1, 1, 1, 100))
    assert reports[-2:] == [(0.5, 180), (0.667, 120)]  # 5 minutes of work took 3


def test_stages_that_a_resumed_demo_skips_do_not_count(reported):
    clock, reports = reported
    clock.step("OPPU", Step(1, 1, 1, 100))
    assert reports == [(round(1 / 6, 3), 300)]


@pytest.mark.parametrize(("platform", "opener"), [("darwin", "open"), ("linux", "xdg-open")])
def test_the_commands_at_the_end_can_be_pasted_into_any_shell(monkeypatch, platform, opener):
    monkeypatch.setattr(demo.sys, "platform", platform)
    found = SimpleNamespace(samples=SimpleNamespace(people=[SimpleNamespace(id="7")]))
    lines = demo.next_commands(Path("my demo"), found)
    assert not [line for line in lines if "#" in line]
    assert f"  {opener} 'my demo/report.html'" in lines
    assert "  mta person show 7 --bank 'my demo/bank' --store 'my demo/people'" in lines


@pytest.fixture
def rate(monkeypatch):
    """Set the rate of matrix products."""
    return lambda found: monkeypatch.setattr(demo, "gemm_rate", lambda _: found)


def test_a_slow_machine_gets_fewer_steps_and_full_gets_all(tmp_path, rate):
    recipe, said = load_demo("movielens"), []
    rate(1e12)
    assert demo._settled(tmp_path / "fast", recipe, [], False, said.append) == override(recipe, recipe.short)
    assert demo._settled(tmp_path / "full", recipe, [], True, said.append) == recipe
    rate(1e11)
    slow = override(recipe, [*recipe.short, *recipe.slow])
    assert demo._settled(tmp_path / "slow", recipe, [], False, said.append) == slow
    assert said == [
        "This machine reaches 1000 GFLOP/s.",
        "This machine reaches 1000 GFLOP/s.",
        f"This machine reaches 100 GFLOP/s: fewer steps ({', '.join(recipe.slow)}).",
    ]


def test_a_slow_processor_beside_a_gpu_that_is_not_used_gets_fewer_steps(tmp_path, rate, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rate(1e11)
    recipe = load_demo("movielens")
    found = demo._settled(tmp_path, recipe, ["run.device=cpu"], False, lambda _: None)
    assert found == override(recipe, [*recipe.short, *recipe.slow, "run.device=cpu"])


def test_a_resumed_demo_keeps_its_version_and_another_one_is_refused(tmp_path, rate):
    recipe = load_demo("movielens")
    rate(1e11)
    first = demo._settled(tmp_path, recipe, [], False, lambda _: None)
    (tmp_path / demo.RECIPE).write_text(dump_yaml(first))
    rate(1e12)
    assert demo._settled(tmp_path, recipe, [], False, lambda _: None) == first
    with pytest.raises(ConfigError, match="other settings"):
        demo._settled(tmp_path, recipe, [], True, lambda _: None)
    with pytest.raises(ConfigError, match="other settings"):
        demo._settled(tmp_path, recipe, ["people.test=7"], False, lambda _: None)
    less = demo._settled(tmp_path, recipe, ["run.memory=2GiB"], False, lambda _: None)
    assert less.run.memory == "2GiB"  # as the hint of a demo that found no memory says
