"""The pictures of the documentation, and the names on its page about the architecture."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from mta.bank.calibration.info import CalibrationInfo
from mta.bank.calibration.laplace import Calibration

ROOT = Path(__file__).parents[2]
DOCS, CODE = ROOT / "docs", ROOT / "src" / "mta"
PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")
SVG = "{http://www.w3.org/2000/svg}"


NAMES = sorted(path.stem for path in (DOCS / "drawing").glob("*.txt"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    subprocess.run([sys.executable, DOCS / "pictures.py", folder], check=True)
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.svg")}


def test_every_picture_of_the_documentation_is_drawn(drawn):
    assert sorted(drawn) == NAMES
    assert sorted(path.stem for path in (DOCS / "pictures").glob("*.svg")) == NAMES, "run: python docs/pictures.py"
    pages = [ROOT / "README.md", *(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]
    shown = {
        name for page in pages for name in re.findall(r"pictures/([\w-]+)\.svg\)", page.read_text(encoding="utf-8"))
    }
    assert sorted(shown) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_valid_and_shows_all_of_its_labels(drawn, name):
    root = ElementTree.fromstring(drawn[name])
    paper = root.find(f"{SVG}rect")
    assert paper.get("fill") == "#ffffff"
    assert float(paper.get("width")) + 1 == float(root.get("width"))
    title, about, _, *shapes = (DOCS / "drawing" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert (root.find(f"{SVG}title").text, root.find(f"{SVG}desc").text) == (title, about)
    texts = ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]
    labels = [label for shape in shapes for label in shape.split(" | ")[1:]]
    assert len(labels) > 10
    assert not [label for label in labels if re.sub(r"[_^]\{([^}]*)\}", r"\1", label) not in texts]
    assert texts[:2] == [title, about]


def test_files_named_in_drawings_exist(drawn):
    files = {path.name for path in CODE.rglob("*.py")}
    named = {name for data in drawn.values() for name in re.findall(r"\w+\.py\b", data)}
    assert len(named) > 20
    assert not named - files


def test_the_coefficients_drawn_are_those_of_a_calibration(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import pictures

    curvature = torch.diag(torch.tensor(pictures.CURVATURES, dtype=torch.float64))
    info = CalibrationInfo(ridge=pictures.RIDGE, prior=pictures.PRIOR)
    calibration = Calibration(torch.tensor(pictures.MU, dtype=torch.float64), curvature, info)
    loglik, shots = torch.tensor([-pictures.LOSS * pictures.SHOTS]), torch.tensor([pictures.SHOTS])
    w = calibration.coefficients(torch.tensor([pictures.GRADIENTS]), loglik, shots)
    torch.testing.assert_close(torch.tensor([pictures.coefficients()], dtype=torch.float64), w)


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
