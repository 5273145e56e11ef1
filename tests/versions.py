"""The built wheel against the oldest versions that pyproject.toml admits, or the newest there are.

    python tests/versions.py oldest              # constraints-oldest.txt
    python3.13 tests/versions.py newest          # whatever pip finds: on Linux torch brings CUDA, 6 GB

Each makes an environment of its own for the Python that runs it, installs the wheel (never the checkout), walks
tests/smoke.py, runs the tests named below, prints a row for docs/decisions/017, and removes the environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
TOOLS = [
    "flask",
    "flask-cors",
    "hatchling",
    "hypothesis",
    "moto[s3]",
    "openai",
    "peft",
    "pytest",
    "pytest-timeout",
    "s3fs",
]
SHOWN = ("torch", "transformers", "peft", "numpy", "pydantic", "typer", "fastapi")
TESTS = [
    "bank",
    "cli",
    "config",
    "data",
    "distributed",
    "evaluation/test_compare.py",
    "lab/test_methods.py",
    "evaluation/test_metrics.py",
    "lab/test_report.py",
    "evaluation/test_report_page.py",
    "kernels",
    "lora",
    "model/test_base.py",
    "model/test_encoders.py",
    "model/test_footprint.py",
    "model/test_generate.py",
    "model/test_tree_attention.py",
    "personalize/test_forgotten.py",
    "personalize/test_learned.py",
    "personalize/test_personalizer.py",
    "personalize/test_pipeline.py",
    "personalize/test_policies.py",
    "personalize/test_update.py",
    "project/test_public.py",
    "project/test_signatures.py",
    "serving/test_contract.py",
    "serving/test_embedded.py",
    "serving/test_gateway.py",
    "serving/test_gateway_limits.py",
    "serving/test_gateway_people.py",
    "store/test_exports.py",
    "store/test_maintenance.py",
    "store/test_state.py",
    "store/test_store.py",
    "tools/test_cost.py",
    "tracking",
    "training",
]


def main(which: str) -> int:
    """Install, walk, test and tell; the exit status of the tests."""
    with TemporaryDirectory(prefix="mta-versions-") as folder:
        python = installed(Path(folder), ["-c", str(ROOT / "constraints-oldest.txt")] if which == "oldest" else [])
        run(python, "-P", str(ROOT / "tests" / "smoke.py"), cwd=folder)
        words = ["-p", "no:cacheprovider", "-m", "not slow", "-k", "not killed_again"]
        words += [f"tests/{name}" for name in TESTS]
        tested = subprocess.run(
            [python, "-m", "pytest", *words], cwd=ROOT, env=own(), stdout=subprocess.PIPE, text=True
        )
        lines = tested.stdout.rstrip().splitlines()
        print("\n".join(lines[-40:]))
        ask = f"from importlib.metadata import version as v; print(*map(v, {SHOWN}), sep=' | ')"
        what = f"{which} | {sys.version.split()[0]} | {run(python, '-c', ask).strip()}"
        print(f"| {what} | {count(lines, tested.returncode)} |")
        return tested.returncode


def installed(folder: Path, limits: list[str]) -> Path:
    """The Python of an environment with the wheel, its extras and what the tests need."""
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    quiet = ["-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
    run(python, *quiet, "hatchling", *limits)
    run(python, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    run(python, *quiet, f"{wheel}[assets,eval,serve,tables,ray]", *TOOLS, *limits)
    return python


def run(python: Path, *words: str, cwd: str | Path | None = None) -> str:
    """What a command printed; it ends everything if it fails."""
    return subprocess.run([python, *words], cwd=cwd, env=own(), check=True, stdout=subprocess.PIPE, text=True).stdout


def own() -> dict[str, str]:
    """The environment without the checkout's path."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def count(lines: list[str], status: int) -> str:
    """pytest's last line, or how it ended without one."""
    last = [line.strip("= ") for line in lines if " passed" in line or " failed" in line]
    return last[-1] if last else f"ended with {status}"


if __name__ == "__main__":
    if sys.argv[1:] not in (["oldest"], ["newest"]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
