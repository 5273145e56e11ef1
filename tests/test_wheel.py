"""The wheel that people install: it holds everything, and works away from the source tree."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    # hatchling itself, rather than a build frontend, which would fetch it anew.
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def run(python: Path, *words: str, cwd: Path) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([python, *words], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_holds_recipes_tasks_report_and_type_marker(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"mta/py.typed", "mta/recipes/movielens.yaml", "mta/evaluation/report.html.jinja"} <= names
    assert "mta/tasks/builtin/lamp3.yaml" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith(("mta/", "merge_then_adapt-"))]


def test_it_works_in_an_environment_of_its_own(wheel, tmp_path):
    """Only the dependencies are borrowed from this environment; mta itself must come from the wheel."""
    python = environment(tmp_path / "env")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel), cwd=tmp_path)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path).strip())
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    assert str(site) in run(python, "-c", "import mta; print(mta.__file__)", cwd=tmp_path)
    assert "demo" in run(python, "-m", "mta", "--help", cwd=tmp_path)
    told = run(python, "-c", "from mta.demo import load_recipe; print(load_recipe('movielens').data)", cwd=tmp_path)
    assert told.strip() == "movielens-100k"
    assert "lamp3" in run(python, "-c", "from mta.tasks import task_names; print(task_names())", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.network
def test_its_own_requirements_are_enough(wheel, tmp_path):
    python = environment(tmp_path / "env")
    run(python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(wheel), cwd=tmp_path)
    run(python, "-c", "import mta; [getattr(mta, name) for name in mta.__all__]", cwd=tmp_path)
    assert "movielens" in run(python, "-m", "mta", "demo", "--help", cwd=tmp_path)
