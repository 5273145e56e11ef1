"""The documentation's drawings are those the script draws, and its page on the architecture names what there is."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from mta.config import MergeSettings
from mta.personalize.likelihoods import Evidence
from mta.personalize.policies import Retrieved, posterior

ROOT = Path(__file__).parents[2]
DOCS, CODE = ROOT / "docs", ROOT / "src" / "mta"
PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    subprocess.run([sys.executable, DOCS / "pictures.py", folder], check=True)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_committed_drawings_are_what_the_script_draws(drawn):
    committed = {path.name: path.read_bytes() for path in (DOCS / "pictures").glob("*.svg")}
    assert committed.keys() == drawn.keys()
    stale = [name for name in drawn if drawn[name] != committed[name]]
    assert not stale, "draw them again: python docs/pictures.py"


def test_drawings_say_what_they_show_on_white_paper(drawn):
    for name, data in drawn.items():
        root = ElementTree.fromstring(data)
        paper = root.find(f"{SVG}rect")
        assert root.find(f"{SVG}title").text, name
        assert root.find(f"{SVG}desc").text, name
        assert paper.get("fill") == "#ffffff", name
        assert float(paper.get("width")) + 1 == float(root.get("width")), name


def test_files_named_in_drawings_exist(drawn):
    files = {path.name for path in CODE.rglob("*.py")}
    named = {name for data in drawn.values() for name in re.findall(r"\w+\.py\b", data.decode())}
    assert len(named) > 20
    assert not named - files


def test_the_coefficients_drawn_are_those_of_the_policy(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    from drawing import merging

    gains = torch.tensor([merging.GAINS], dtype=torch.float64)
    shot = Evidence(torch.cat([torch.zeros(1, 1), gains], 1)[:, None], torch.ones(1, 1))
    settings = MergeSettings(null_prior=merging.PRIOR, temperature=merging.TEMPERATURE)
    w = posterior(settings, Retrieved(torch.arange(gains.shape[1])[None], torch.zeros_like(gains), shot))
    drawn = merging.posterior(merging.GAINS, merging.PRIOR, merging.TEMPERATURE)
    torch.testing.assert_close(torch.tensor([drawn], dtype=torch.float64), w)


def test_files_and_names_of_the_architecture_page_exist():
    files = re.findall(r"`((?:\w+/)*\w+\.py)`", PAGE)
    folders = re.findall(r"`((?:\w+/)+)`", PAGE)
    assert len(files) > 30
    assert not [name for name in files if not (CODE / name).is_file()]
    assert not [name for name in folders if not (CODE / name).is_dir()]
    pairs = re.findall(r"`((?:\w+/)*\w+\.py)`\s+\(((?:`\w+`(?:, )?)+)\)", PAGE)
    assert len(pairs) > 30
    for file, names in pairs:
        text = (CODE / file).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names):
            assert re.search(rf"\b(?:def|class) {name}\b", text), (file, name)


def test_the_architecture_page_lists_all_packages_in_import_order():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [name.strip() for line in contracts[0]["layers"] for name in line.split("|")]
    named = {re.split(r"[/.]", name)[0] for name in re.findall(r"`((?:\w+/)*\w*(?:/|\.py))`", PAGE)}
    assert named == set(layers)
    assert [*re.findall(r"(?m)^\| `(\w+)/` \|", PAGE), "errors"] == layers


def test_the_architecture_page_tells_a_texts_life_in_eight_steps():
    assert re.findall(r"(?m)^(\d+)\. \*\*", PAGE) == [str(n) for n in range(1, 9)]
