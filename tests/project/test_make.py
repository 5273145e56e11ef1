"""How make creates an environment, with stand-ins for Python."""

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")
WITHOUT_ENSUREPIP = """#!/bin/sh
[ "$1" = -c ] && exit 0
[ "$3" = --clear ] && shift
mkdir -p "$3/bin" && touch "$3/bin/python" && exit 1
"""
TOO_OLD = """#!/bin/sh
[ "$1" = -c ] && exit 1
mkdir -p "$4/bin" && touch "$4/bin/python"
"""
INSTALLS = """#!/bin/sh
[ "$1" = -c ] && exit 0
[ "$2" = pip ] && touch "$(dirname "$0")/../pip" && exit 0
rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python"
"""


def make(folder: Path, python: str, target: str = "bin/python") -> subprocess.CompletedProcess[str]:
    """Create an environment in ``folder`` with this script as Python."""
    script = folder / "python"
    script.write_text(python)
    script.chmod(0o755)
    words = [f"PYTHON={script}", f"VENV={folder / 'venv'}", str(folder / "venv" / target)]
    return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True)


def test_an_environment_that_failed_is_removed(tmp_path: Path) -> None:
    assert make(tmp_path, WITHOUT_ENSUREPIP).returncode != 0
    assert not (tmp_path / "venv").exists()


def test_an_old_python_is_refused_before_an_environment_is_made(tmp_path: Path) -> None:
    done = make(tmp_path, TOO_OLD)
    assert done.returncode != 0
    assert "mta needs Python 3.11 or newer: make demo PYTHON=python3.13" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_replaced_python_gets_the_packages_again(tmp_path: Path) -> None:
    """``venv --clear`` removes them after make has seen that they are there."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to("/no/python")
    (tmp_path / "venv" / "installed").touch()
    done = make(tmp_path, INSTALLS, "installed")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "venv" / "pip").exists()


def test_the_version_that_make_checks_is_that_of_the_package() -> None:
    least = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert f"sys.version_info < ({least.replace('.', ', ')})" in (ROOT / "Makefile").read_text()
