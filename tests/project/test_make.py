"""How make creates an environment, with stand-ins for Python."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")
WITHOUT_ENSUREPIP = """#!/bin/sh
[ "$1" = -c ] && exit 0
[ "$3" = --clear ] && shift
mkdir -p "$3/bin" && touch "$3/bin/python" && exit 1
"""


def make(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    """Create an environment in ``folder`` with this script as Python."""
    script = folder / "python"
    script.write_text(python)
    script.chmod(0o755)
    words = [f"PYTHON={script}", f"VENV={folder / 'venv'}", str(folder / "venv" / "bin" / "python")]
    return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True)


def test_an_environment_that_failed_is_removed(tmp_path: Path) -> None:
    assert make(tmp_path, WITHOUT_ENSUREPIP).returncode != 0
    assert not (tmp_path / "venv").exists()
