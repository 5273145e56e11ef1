"""The guide to a method of one's own: its code, as it stands there."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY_RUN, HashEncoder, people_of

from mta.config import MergeSettings
from mta.evaluation.context import Context
from mta.evaluation.experiments.recipe import load_experiment
from mta.evaluation.methods import METHODS
from mta.evaluation.methods.merged import answered
from mta.evaluation.methods.method import Method, Outcome, register
from mta.evaluation.protocol import Panel

GUIDE = (Path(__file__).parents[2] / "docs" / "how-to" / "add-a-method.md").read_text()


@pytest.fixture
def methods():
    """The two classes of the guide, registered for one test."""
    given = {"replace": replace, "MergeSettings": MergeSettings, "answered": answered, "Method": Method}
    names = {**given, "Outcome": Outcome, "register": register, "Panel": Panel, "__name__": "guide"}
    before = dict(METHODS)
    for block in re.findall(r"```python\n((?!def test_|report = ).*?)```", GUIDE, re.DOTALL):
        exec(compile(block.replace("from __future__ import annotations\n", ""), "guide", "exec"), names)
    yield {name: METHODS[name] for name in METHODS.keys() - before.keys()}
    METHODS.clear()
    METHODS.update(before)


def test_the_methods_of_the_guide_do_what_it_says(methods, tiny):
    assert set(methods) == {"smoothed", "shrunk"}
    base, bank = tiny
    people, pool = people_of(3, prefix="x", seed=7), people_of(4, prefix="t")
    context = Context(base, bank, HashEncoder(), TINY_RUN, task_people=pool)
    panel = Panel.of(context, people, shots=3, queries=3)
    smoothed = methods["smoothed"]().run(panel, 0)
    alone = Panel.of(context, people[:1], shots=3, queries=3)
    assert torch.equal(methods["smoothed"]().run(alone, 0).answers[0].scores, smoothed.answers[0].scores)
    shares = smoothed.answers[0].scores.exp().sum(1)
    torch.testing.assert_close(shares, torch.ones_like(shares))
    plain, _ = panel.merge(MergeSettings(policy="posterior", k=0), 0)
    torch.testing.assert_close(methods["shrunk"](by=0.5).run(panel, 0).merge.w, 0.5 * plain.w)


def test_the_test_of_the_guide_passes(methods, tiny):
    base, bank = tiny
    people = people_of(3, prefix="x", seed=7)
    panel = Panel.of(Context(base, bank, HashEncoder(), TINY_RUN), people, shots=3, queries=3)
    names = {"Smoothed": methods["smoothed"], "pytest": pytest}
    exec(re.search(r"```python\n(def test_smoothed.*?)```", GUIDE, re.DOTALL)[1], names)
    names["test_smoothed_shares_without_a_pull_are_the_persons_own"](panel)


def test_the_recipe_of_the_guide_can_be_read(methods, tmp_path):
    text = re.search(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)[1]
    (tmp_path / "mine.yaml").write_text(text)
    recipe = load_experiment(tmp_path / "mine.yaml")
    assert [m.name for m in recipe.exhibits["mine"][0].methods][2:] == ["smoothed shares", "smoothed, pull 16"]
    assert yaml.safe_load(text)["over"] == "movielens"
