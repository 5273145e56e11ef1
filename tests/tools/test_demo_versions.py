"""The version of a demo's recipe that runs, and what to do after a demo."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mta.config import override
from mta.config.loader import dump_yaml
from mta.errors import ConfigError
from mta.tools import demo
from mta.tools.demo import load_demo


@pytest.mark.parametrize(("platform", "opener"), [("darwin", "open"), ("linux", "xdg-open")])
def test_the_commands_at_the_end_can_be_pasted_into_any_shell(monkeypatch, platform, opener):
    monkeypatch.setattr(demo.sys, "platform", platform)
    found = SimpleNamespace(people=[SimpleNamespace(id="7")])
    lines = demo.next_commands(Path("my demo"), found)
    assert not [line for line in lines if "#" in line]
    assert f"  {opener} 'my demo/report.html'" in lines
    assert "  mta person show 7 --bank 'my demo/bank' --store 'my demo/people'" in lines


def test_a_demo_with_other_settings_is_refused_in_the_folder_of_a_demo(tmp_path):
    recipe = load_demo("movielens")
    first = override(recipe, recipe.short)
    demo._check_same(tmp_path, first)
    (tmp_path / demo.RECIPE).write_text(dump_yaml(first))
    demo._check_same(tmp_path, first)
    for words in ([], [*recipe.short, "people.test=7"]):
        with pytest.raises(ConfigError, match="other settings"):
            demo._check_same(tmp_path, override(recipe, words))
    demo._check_same(tmp_path, override(first, ["run.memory=2GiB"]))  # as the hint of a demo without memory says


@pytest.mark.parametrize("name", ["survey", "movielens"])
def test_both_versions_of_the_packaged_recipes_are_complete(name):
    recipe = load_demo(name)
    shown = override(recipe.run, recipe.history)
    assert shown.task_lora.history == (8 if name == "survey" else 0)
    short = override(recipe, recipe.short)
    assert (short.history, short.evaluation.brief) == ((), True)
