"""The wheel that people install: it holds everything, and works away from the source tree."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.integration


def built(kind: str, out: Path, source: Path = ROOT) -> Path:
    """A wheel or sdist, by hatchling itself rather than a build frontend, which would fetch it anew."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", out]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The folder that the sdist unpacks to."""
    out = tmp_path_factory.mktemp("sdist")
    with tarfile.open(built("sdist", out)) as archive:
        archive.extractall(out, filter="data")
    return next(path for path in out.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def borrowing(wheel, tmp_path_factory):
    """The Python of an environment with this wheel, which borrows all else from ours."""
    folder = tmp_path_factory.mktemp("borrowing")
    python = environment(folder / "env")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel), cwd=folder)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip())
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    assert str(site) in run(python, "-c", "import mta; print(mta.__file__)", cwd=folder)
    return python


def environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def run(python: Path, *words: str, cwd: Path, **own: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | own
    done = subprocess.run([python, *words], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_recipes_tasks_report_and_type_marker(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"mta/py.typed", "mta/recipes/movielens.yaml", "mta/evaluation/reports/report.html.jinja"} <= names
    assert "mta/data/tasks/builtin/lamp3.yaml" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "mta_lab/recipes/_paper.yaml" in names
    assert not [name for name in names if not name.startswith(("mta/", "mta_lab/", "merge_then_adapt-"))]


def test_the_sdist_holds_everything_needed_to_build(unpacked):
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    texts = {"README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "SECURITY.md", "PKG-INFO"}
    settings = {
        "pyproject.toml",
        "constraints.txt",
        "constraints-oldest.txt",
        "Makefile",
        "Dockerfile",
        ".dockerignore",
    }
    assert (
        texts | settings | {"docs/how-to/serve.md", "tests/conftest.py", "tests/public_api.txt", "src/mta/py.typed"}
        <= files
    )
    folders = {name.partition("/")[0] for name in files if "/" in name}
    assert folders == {"src", "tests", "docs", "benchmarks"}
    assert {name for name in files if "/" not in name} - texts - settings == {".gitignore"}  # hatchling's own choice
    if shutil.which("git"):
        found = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True)
        assert set(found.stdout.split()) <= files  # nothing where this is no checkout


def test_a_wheel_made_from_the_sdist_is_the_same_wheel(wheel, unpacked, tmp_path):
    again = built("wheel", tmp_path, unpacked)
    assert again.name == wheel.name
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert one.namelist() == other.namelist()
        assert [name for name in one.namelist() if one.read(name) != other.read(name)] == []


def test_the_wheel_works_in_its_own_environment(borrowing, tmp_path):
    """Only the dependencies are borrowed from this environment; mta itself must come from the wheel."""
    assert "demo" in run(borrowing, "-m", "mta", "--help", cwd=tmp_path)
    printed = run(
        borrowing, "-c", "from mta.tools.demo import load_demo; print(load_demo('movielens').data)", cwd=tmp_path
    )
    assert printed.strip() == "movielens-100k"
    assert "lamp3" in run(borrowing, "-c", "from mta.data.tasks import task_names; print(task_names())", cwd=tmp_path)
    walked = run(borrowing, "-P", str(ROOT / "tests" / "smoke.py"), cwd=tmp_path, MTA_KERNELS="off")  # saves 10 s
    assert walked.splitlines()[-1] == "ok"


@pytest.mark.slow
@pytest.mark.network
def test_the_declared_requirements_are_enough(wheel, tmp_path):
    python = environment(tmp_path / "env")
    run(python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(wheel), cwd=tmp_path)
    assert run(python, "-P", str(ROOT / "tests" / "smoke.py"), cwd=tmp_path).splitlines()[-1] == "ok"
    assert "movielens" in run(python, "-m", "mta", "demo", "--help", cwd=tmp_path)
