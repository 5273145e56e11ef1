"""The README's quick start, as written, on a JSONL file made here."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
GOOD = ["Warm sound, sturdy build", "Lovely melody, clear voices", "Works as described, fast delivery"]
BAD = ["Broke in a week", "Thin, noisy and overpriced", "Stopped working after a day"]


def reviews(person: str, generosity: float, count: int) -> list[dict[str, str]]:
    draw = random.Random(person)
    rows = []
    for n in range(count):
        good = draw.random() < 0.5
        stars = max(1, min(5, round((4 if good else 2) + generosity + draw.gauss(0, 0.5))))
        text = f"{draw.choice(GOOD if good else BAD)}, number {draw.randrange(1000)}."
        rows.append({"person": person, "input": text, "output": str(stars), "time": f"2024-03-{n + 1:02}"})
    return rows


def write(path: Path, people: list[str], count: int) -> None:
    rows = [row for i, person in enumerate(people) for row in reviews(person, (i % 3) - 1, count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.network
def test_the_quick_start_runs_as_written(tmp_path, fetched):
    for asset in ("smollm2-135m-instruct", "all-minilm-l6-v2"):
        fetched(asset)
    write(tmp_path / "history.jsonl", [f"reader-{n}" for n in range(24)], 12)
    write(tmp_path / "newcomers.jsonl", ["ann", "bob", "cem"], 8)
    script = re.search(r"<!-- quickstart -->\n```bash\n(.*?)```", README.read_text(), re.DOTALL)[1]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euxc", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 people personalized" in done.stdout
    assert {"bank", "people", "results"} <= {path.name for path in tmp_path.iterdir()}
    assert "ann-adapter: written" in done.stdout
    assert not (tmp_path / "ann-adapter").exists()  # it left with ann
    assert (tmp_path / "results" / "report.html").stat().st_size > 10_000
    assert "the merge explains their shots" in done.stdout
    assert "removed" in done.stdout
