"""The Dockerfile without a container engine: linted, and its copies and commands run outside an image."""

import fnmatch
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from served import served

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each instruction, without comments, with continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def copied() -> list[str]:
    """Paths copied from the checkout."""
    return [
        path for word, rest in instructions() if word == "COPY" and "--from" not in rest for path in rest.split()[:-1]
    ]


def health(port: int, python: str = sys.executable) -> int:
    """Exit status of the image's health command on another port."""
    (check,) = [rest for word, rest in instructions() if word == "HEALTHCHECK"]
    command = json.loads(check.partition(" CMD ")[2])
    assert command[0] == "python"
    return subprocess.run(
        [python, command[1], command[2].replace("8000", str(port))], stderr=subprocess.PIPE
    ).returncode


def test_hadolint_finds_nothing():
    try:
        done = subprocess.run(
            [Path(sys.executable).parent / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True
        )
    except OSError as error:
        pytest.skip(f"hadolint cannot start: {error}")
    assert (done.returncode, done.stdout) == (0, "")


def test_dockerignore_sends_exactly_what_is_copied():
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    assert rules[0] == "*"  # no history, no data, no keys
    sent = {rule[1:] for rule in rules if rule.startswith("!")}
    assert sent == set(copied())
    assert all((ROOT / path).exists() for path in sent)
    assert [rule for rule in rules[1:] if not rule.startswith("!")] == ["**/__pycache__"]


def test_the_image_runs_without_root_and_writes_only_to_the_volume():
    said = dict(instructions())  # of words that come twice, the last: that of the final image
    assert int(said["USER"]) > 0
    assert json.loads(said["ENTRYPOINT"]) == ["mta"]
    assert said["VOLUME"] == said["WORKDIR"] == "/data"
    places = [
        word.partition("=")[2] for word in said["ENV"].split() if word.startswith(("HOME", "MTA_CACHE", "HF_HOME"))
    ]
    assert len(places) == 3
    assert all(fnmatch.fnmatch(place, "/data*") for place in places)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_health_command_reports_the_engines_health(tiny, tmp_path):
    def broken():
        raise MemoryError("no more")

    with served(*tiny, tmp_path) as running:
        port = int(running.url.rpartition(":")[2])
        assert health(port) == 0
        running.service.engine.scheduler.step = broken
        with running.http("admin") as http:
            body = {"model": "task", "prompt": "Film 7", "max_tokens": 8}
            assert http.post("/v1/completions", json=body).status_code == 503
        assert health(port) == 1
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there, and nobody can meanwhile
        assert health(taken.getsockname()[1]) == 1


@pytest.mark.slow
@pytest.mark.network
def test_the_build_stage_installs_a_working_mta(tmp_path):
    """Run the build stage's commands on only the copied files, with another path for /opt/mta."""
    context, home = tmp_path / "src", tmp_path / "opt"
    context.mkdir()
    for path in copied():
        (shutil.copytree if (ROOT / path).is_dir() else shutil.copy)(ROOT / path, context / path)
    (build,) = [rest for word, rest in instructions() if word == "RUN" and "/opt/mta" in rest]
    build = build.replace("python -m venv", f"{sys.executable} -m venv").replace("/opt/mta", str(home))
    subprocess.run(["sh", "-euc", build], cwd=context, check=True)
    smoke = [home / "bin" / "python", "-P", ROOT / "tests" / "smoke.py"]
    done = subprocess.run(smoke, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["ok"]), done.stderr
