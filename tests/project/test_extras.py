"""Extras: what works without them, and the error of each feature that needs one."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mta.cli.compare import compare
from mta.cli.machine import demo
from mta.cli.serve import serve
from mta.data.readers import read_people
from mta.data.tasks import load_task
from mta.distributed.ray import Cluster
from mta.errors import MissingExtra
from mta.evaluation.metrics import Answers, measure
from mta.evaluation.reports import figures
from mta.system.assets import fetch
from mta.system.extras import EXTRAS, install
from mta_lab.bm25 import retrieve
from mta_lab.cli import attack, evaluate, report, score
from mta_lab.methods.published import Prime

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {package: package.replace("-", "_") for packages in EXTRAS.values() for package in packages}

OTHERS_NEED = {"httpx2"}  # huggingface-hub brings it in any case
OTHERS_NEED |= {"pyarrow"}  # scikit-learn looks for it among the imported modules


def test_the_extras_are_those_of_the_distribution():
    listed = {
        extra: tuple(re.split(r"\[|>=", line)[0] for line in lines)
        for extra, lines in PROJECT["optional-dependencies"].items()
        if extra not in ("docs", "dev")
    }
    assert listed == dict(EXTRAS)


@pytest.mark.integration
def test_without_extras_a_bank_is_built_and_people_are_personalized_answered_and_exported(tmp_path):
    """``sitecustomize`` hides the packages from every Python of the walk, also from the command line's."""
    hidden = sorted(set(MODULES.values()) - OTHERS_NEED)
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({hidden}))\n")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "MTA_KERNELS": "off"}
    code = "import gguf"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "ModuleNotFoundError" in done.stderr
    walked = subprocess.run([sys.executable, ROOT / "tests" / "smoke.py"], env=env, capture_output=True, text=True)
    assert walked.stdout.splitlines()[-1:] == ["ok"], walked.stderr


FEATURES = {
    "a gateway": ("serve", "fastapi", lambda: serve()),
    "an experiment": ("lab", "cma", lambda: evaluate("lamp3")),
    "a comparison": ("eval", "matplotlib", lambda: compare("people.jsonl")),
    "an attack": ("lab", "cma", lambda: attack("people.jsonl")),
    "scores": ("lab", "rouge-score", lambda: score(Path("mine.json"), "true.json", "lamp3")),
    "a report": ("lab", "matplotlib", lambda: report([Path("runs")])),
    "a demo": ("eval", "rouge-score", lambda: demo()),
    "ROUGE": ("eval", "rouge-score", lambda: measure(load_task("lamp4"), Answers(["a"]), ["b"])),
    "BM25": ("lab", "bm25s", lambda: retrieve(load_task("lamp4"), None, [], 1)),
    "CMA-ES": ("lab", "cma", lambda: Prime().run(None, 0)),
    "a picture": ("eval", "matplotlib", lambda: figures.Picture("alt", lambda axes: None).data_uri()),
    "an asset that is converted": ("assets", "gguf", lambda: fetch("smollm2-135m-instruct")),
    "Parquet": ("tables", "pyarrow", lambda: read_people(Path("people.parquet"), "text")),
    "a cluster": ("ray", "ray", lambda: Cluster("local")),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_without_its_package_names_the_extra_to_install(feature, cache, tmp_path, monkeypatch):
    extra, package, use = FEATURES[feature]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, MODULES[package], None)
    with pytest.raises(MissingExtra) as caught:
        use()
    assert caught.value.message == f"{package} is not installed; it belongs to the extra {extra!r}"
    assert caught.value.hint == install(extra)
    assert package in caught.value.hint  # by name: mta itself need not be on an index
    assert not any(tmp_path.iterdir())
