"""The guide to a method of one's own: its code, as it stands there."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY_RUN, HashEncoder, people_of

from mta.config import MergeSettings, plugins
from mta.evaluation.context import Context
from mta.evaluation.protocol import TestBatch
from mta_lab.experiments.recipe import load_experiment
from mta_lab.methods.named import method_class, method_names

GUIDE = (Path(__file__).parents[2] / "docs" / "how-to" / "add-a-method.md").read_text()


@pytest.fixture
def methods(tmp_path, monkeypatch):
    """The two classes of the guide, in a package that is installed for one test."""
    blocks = re.findall(r"```python\n((?!def test_|report = ).*?)```", GUIDE, re.DOTALL)
    code = "\n".join(block.replace("from __future__ import annotations\n", "") for block in blocks)
    (tmp_path / "my_methods.py").write_text(f"from __future__ import annotations\n{code}")
    (project,) = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    (group,) = (named := tomllib.loads(project)["project"])["entry-points"]
    installed = tmp_path / "my_methods-0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {named['name']}\nVersion: {named['version']}\n")
    entries = [f"{name} = {place}" for name, place in named["entry-points"][group].items()]
    (installed / "entry_points.txt").write_text("\n".join([f"[{group}]", *entries]))
    monkeypatch.syspath_prepend(tmp_path)
    plugins.entries.cache_clear()
    yield {name: method_class(name) for name in sorted(set(method_names()) & {"smoothed", "shrunk"})}
    plugins.entries.cache_clear()
    del sys.modules["my_methods"]


def test_the_methods_of_the_guide_do_what_it_says(methods, tiny):
    assert set(methods) == {"smoothed", "shrunk"}
    base, bank = tiny
    people, pool = people_of(3, prefix="x", seed=7), people_of(4, prefix="t")
    context = Context(base, bank, HashEncoder(), TINY_RUN, task_people=pool)
    batch = TestBatch.of(context, people, shots=3, queries=3)
    smoothed = methods["smoothed"]().run(batch, 0)
    alone = TestBatch.of(context, people[:1], shots=3, queries=3)
    assert torch.equal(methods["smoothed"]().run(alone, 0).answers[0].scores, smoothed.answers[0].scores)
    shares = smoothed.answers[0].scores.exp().sum(1)
    torch.testing.assert_close(shares, torch.ones_like(shares))
    plain, _ = batch.merge(MergeSettings(policy="posterior", k=0), 0)
    torch.testing.assert_close(methods["shrunk"](by=0.5).run(batch, 0).merge.w, 0.5 * plain.w)


def test_the_test_of_the_guide_passes(methods, tiny):
    base, bank = tiny
    people = people_of(3, prefix="x", seed=7)
    batch = TestBatch.of(Context(base, bank, HashEncoder(), TINY_RUN), people, shots=3, queries=3)
    names = {"Smoothed": methods["smoothed"], "pytest": pytest}
    exec(re.search(r"```python\n(def test_smoothed.*?)```", GUIDE, re.DOTALL)[1], names)
    names["test_smoothed_shares_without_a_pull_are_the_persons_own"](batch)


def test_the_recipe_of_the_guide_can_be_read(methods, tmp_path):
    text = re.search(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)[1]
    (tmp_path / "mine.yaml").write_text(text)
    recipe = load_experiment(tmp_path / "mine.yaml")
    assert [m.name for m in recipe.exhibits["mine"][0].methods][2:] == ["smoothed shares", "smoothed, pull 16"]
    assert yaml.safe_load(text)["over"] == "movielens"
